"""``adapter``: what is in an adapter file, what it changes, and the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SHOWN = 12

adapter_app = typer.Typer(
    help="Look into an adapter file, compare it, or merge it into its base model.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

AdapterFile = Annotated[Path, typer.Argument(metavar="FILE", help="An adapter.safetensors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, with stable keys.")]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="W", help="The base weights: a file, official or random [as at training]."),
]


@adapter_app.command("info")
def adapter_info(file: AdapterFile, as_json: JsonOption = False) -> None:
    """Print what an adapter is and what it was trained on."""
    from medsam_lora.stages.adapters import info

    found = info(file)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        typer.echo(f"{name:<20}{_plain(value)}")


@adapter_app.command("merge")
def adapter_merge(
    file: AdapterFile,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.pth",
            help="The checkpoint to write, or .safetensors; never overwritten [merged.pth beside FILE].",
        ),
    ] = None,
    weights: WeightsOption = None,
) -> None:
    """Write a stock SAM checkpoint with the adapter merged in, checked."""
    from medsam_lora.stages.adapters import merge

    done = merge(file, out, weights)
    typer.echo(
        f"merged into {done['model']} at {done['image_size']} px (logits differ by {done['largest_difference']:.1e} of "
        f"the largest; the fusion of modalities, {done['fusion']}, is not part of it): {done['out']}"
    )


@adapter_app.command("diff")
def adapter_diff(
    file: AdapterFile,
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="Another adapter [the base model].")] = None,
    weights: WeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what an adapter changes in its base model, or from another."""
    from medsam_lora.stages.adapters import diff

    found = diff(file, other, weights)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"against {found['against']}")
    for name, (here, there) in found["metadata"].items():
        typer.echo(f"  {name}: {_plain(here)} | {_plain(there)}")
    for words, key in (("only in this one", "only_here"), ("only in the other", "only_there")):
        if found[key]:
            typer.echo(f"{words}: {len(found[key])} tensors, {found[key][0]} first")
    moved = [row for row in found["tensors"] if row["change"] is None or row["change"] > 0]
    typer.echo(f"{len(moved)} tensors differ, of {len(found['tensors'])} compared")
    for row in moved[:SHOWN]:
        change = "another shape" if row["change"] is None else f"{row['change']:.4g}"
        share = "" if row["relative"] is None else f" ({100 * row['relative']:.3g} %)"
        typer.echo(f"  {row['name']}: {change}{share}")
    if len(moved) > SHOWN:
        typer.echo(f"  ... and {len(moved) - SHOWN} more (--json shows all)")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_plain(item)}" for name, item in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
