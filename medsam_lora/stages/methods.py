"""What every method costs on a base model: counted on the model's shapes, without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from medsam_lora.config import MethodConfig
from medsam_lora.models.outline import encoder_macs, outline
from medsam_lora.models.sam import SamModel
from medsam_lora.peft import METHODS, attach, method_spec
from medsam_lora.peft.edits import Edit

KI: Final = 1024
GIGA: Final = 1e9

VARIANTS: Final[Sequence[MethodConfig]] = (
    MethodConfig(name="lora", rank=4),
    MethodConfig(name="lora", rank=4, decoder="lora"),
    MethodConfig(name="lora", blocks="last 4"),
    MethodConfig(name="lora", decoder="frozen"),
    MethodConfig(name="sd_trans", depth=3),
    MethodConfig(name="sam_parser", layers=["linears"]),
    MethodConfig(name="sam_parser", layers=["neck", "linears"]),
    MethodConfig(name="sam_parser", bases=True),
    MethodConfig(name="sam_parser+lora"),
)
"""Rows of the table beside every method with its defaults."""

PAPER: Final[Sequence[tuple[MethodConfig, str, str]]] = (
    (MethodConfig(name="decoder_only"), "3963.2", ""),
    (
        MethodConfig(name="lora", rank=4),
        "+144",
        "its total 4080.2 is not 3963.2 + 144, which is 4107.2",
    ),
    (MethodConfig(name="prompt_generator"), "+3514.5", "the paper calls it Adapter"),
    (MethodConfig(name="sam_parser"), "+0.5", ""),
    (
        MethodConfig(name="sam_parser", bases=True),
        "+889.2",
        "U and Vh of the two convolutions hold 896.0 Ki (printed: 888.7); with the coefficients 896.5",
    ),
)
"""Table 4 of SAM-PARSER (arXiv 2308.14604v3): the settings of a row on ViT-B, its printed parameters in Ki (the
decoder's for the first, else what is added to it), and what is to be said of it."""

HOW_COUNTED: Final = (
    "GMAC: multiply-accumulates of the image encoder for one image at the model's own size, every matrix product and\n"
    "convolution, those inside the attention included; what is computed once per batch from weights alone is not.\n"
    "ViT-B has 486.0 so counted; its Linears and convolutions alone are 368.7. SAM-PARSER prints 374.9 and does not\n"
    "say how it counts."
)


def methods(model: str = "vit_b", only: MethodConfig | None = None) -> list[dict[str, Any]]:
    """The rows of the table of methods.

    Parameters
    ----------
    model : str
        A key of `MODELS`.
    only : MethodConfig, optional
        One method with these settings, instead of the whole table.

    Returns
    -------
    list of dict
        The first row of a method has its default options; variants follow it. ``method``; ``options`` (those it reads,
        with their values); ``encoder_parameters`` (what it adds or trains in the image encoder) and ``encoder_ki`` (in
        units of 1024); ``trainable_parameters`` (with the mask decoder where it trains it) and ``share_of_model``;
        ``gmac_per_image`` of the adapted image encoder (for a slice that is predicted: sd_trans encodes a stack for it)
        and ``extra_gmac_per_image`` over the base's; ``cache_point``; ``mergeable``; ``source``; ``summary``; ``paper``
        (``printed``, ``agrees``, ``note``; None where SAM-PARSER's Table 4 has no such row).

    Raises
    ------
    WeightsError
        For an unknown model.
    ConfigError
        Where settings do not suit the model.
    """
    base = outline(model)
    base_macs = encoder_macs(base)
    n_parameters = sum(p.numel() for p in base.parameters())
    configs = [only] if only is not None else _in_order([MethodConfig(name=name) for name in METHODS])
    return [_row(base, config, base_macs, n_parameters) for config in configs]


def as_text(rows: Sequence[Mapping[str, Any]], model: str) -> str:
    """The rows for people, with how they were counted.

    Parameters
    ----------
    rows : sequence of mapping
        From `methods`.
    model : str
    """
    header = ("method", "options", "trainable", "share", "encoder Ki", "GMAC", "extra", "cache point", "merges")
    lines = [header]
    lines += [
        (
            row["method"],
            _changed(row),
            f"{row['trainable_parameters']:,}",
            f"{100 * row['share_of_model']:.2f} %",
            f"{row['encoder_ki']:.1f}",
            f"{row['gmac_per_image']:.1f}",
            f"{row['extra_gmac_per_image']:+.2f}",
            row["cache_point"] or "none",
            "yes" if row["mergeable"] else "no",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = {2, 3, 4, 5, 6}
    text = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    notes = [_paper_line(row) for row in rows if row["paper"] is not None]
    if notes:
        notes = ["", "Table 4 of SAM-PARSER (arXiv 2308.14604), parameters in Ki:", *notes]
    shown = {part.strip() for row in rows for part in row["method"].split("+")}
    sources = [f"  {name}: {spec.source}" for name, spec in METHODS.items() if name in shown]
    body = [f"{model}: what a method trains, and what it costs", *(line.rstrip() for line in text)]
    return "\n".join([*body, "", HOW_COUNTED, *notes, "", "sources", *sources])


def _row(base: SamModel, config: MethodConfig, base_macs: int, n_parameters: int) -> dict[str, Any]:
    spec = method_spec(config.name)
    adaptation = attach(base, config, 0)
    report = adaptation.report
    in_encoder = sum(t.count for t in report.tensors if t.name.startswith("image_encoder."))
    # Where tensors alone are exchanged, the encoder computes what it computed.
    macs = encoder_macs(base, report.depth) if any(_adds_work(edit) for edit in adaptation.edits) else base_macs
    adaptation.detach()
    return {
        "method": config.name,
        "options": {name: config.model_dump(mode="json")[name] for name in spec.options},
        "encoder_parameters": in_encoder,
        "encoder_ki": in_encoder / KI,
        "trainable_parameters": report.count,
        "share_of_model": report.count / n_parameters,
        "gmac_per_image": macs / GIGA,
        "extra_gmac_per_image": (macs - base_macs) / GIGA,
        "cache_point": report.cache_point,
        "mergeable": report.mergeable,
        "source": spec.source,
        "summary": spec.summary,
        "paper": _paper(base.name, config, in_encoder, report.count),
    }


def _adds_work(edit: Edit) -> bool:
    from torch import nn

    return edit.path.startswith("image_encoder.") and not isinstance(edit.adapted, nn.Parameter)


def _in_order(defaults: Sequence[MethodConfig]) -> list[MethodConfig]:
    """Every method followed by its variants, combinations last."""
    rows = [row for config in defaults for row in (config, *(v for v in VARIANTS if v.name == config.name))]
    return rows + [variant for variant in VARIANTS if variant not in rows]


def _paper(model: str, config: MethodConfig, in_encoder: int, count: int) -> dict[str, Any] | None:
    for row, printed, note in PAPER:
        if model == "vit_b" and row == config:
            # The first row is the decoder, which the others train as well.
            ours = (in_encoder or count) / KI
            digits = len(printed.partition(".")[2])
            return {"printed": printed, "agrees": f"{ours:.{digits}f}" == printed.removeprefix("+"), "note": note}
    return None


def _paper_line(row: Mapping[str, Any]) -> str:
    paper, ours = row["paper"], (row["encoder_parameters"] or row["trainable_parameters"]) / KI
    verdict = "as counted here" if paper["agrees"] else f"counted here {ours:.1f}"
    name = " ".join(part for part in (row["method"], _changed(row)) if part)
    return f"  {name}: {paper['printed']}, {verdict}{'; ' if paper['note'] else ''}{paper['note']}"


def _changed(row: Mapping[str, Any]) -> str:
    """The options that are not at their defaults."""
    defaults = MethodConfig().model_dump(mode="json")
    return " ".join(f"{name}={_short(value)}" for name, value in row["options"].items() if value != defaults[name])


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
