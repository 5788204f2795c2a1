"""The methods: ways to adapt a SAM model, all through one `Adaptation` contract.

Importing this package needs no torch. A method is one module with a function
``attach(model, config, generator) -> Adaptation`` and one entry of `METHODS`; `docs/extending.md` shows how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final

from medsam_lora.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

    from medsam_lora.config import MethodConfig
    from medsam_lora.peft.contract import Adaptation


@dataclass(frozen=True)
class MethodSpec:
    """What is known of a method before any model exists.

    Parameters
    ----------
    name : str
    summary : str
        What is trained, in one line.
    source : str
        The publication it comes from.
    mergeable : bool
        Whether the trained adaptation can be written as a stock SAM checkpoint.
    module : str
        Dotted path of the module with its ``attach``, imported when the method is used.
    options : tuple of str
        The settings of section ``method`` that it reads.
    identity : bool
        Whether the adapted model starts as the base model.
    prompted : bool
        Whether it goes by the prompts that it is given; False: it has its own, and predicts without any.
    """

    name: str
    summary: str
    source: str
    mergeable: bool
    module: str
    options: tuple[str, ...] = ()
    identity: bool = True
    prompted: bool = True


LOW_RANK_OPTIONS: Final = ("rank", "alpha", "scaling", "dropout", "targets", "dora", "init", "lora_plus")
"""Options of low-rank branches, which other methods read for a mask decoder of ``decoder: lora``."""

DECODER_OPTIONS: Final = ("decoder", *LOW_RANK_OPTIONS)


METHODS: Final[Mapping[str, MethodSpec]] = {
    "zero_shot": MethodSpec(
        "zero_shot",
        "nothing is trained: the base model as published",
        "Kirillov et al. 2023, Segment Anything, arXiv 2304.02643",
        True,
        "medsam_lora.peft.zero_shot",
    ),
    "decoder_only": MethodSpec(
        "decoder_only",
        "the whole mask decoder; the image encoder stays frozen, so its embeddings can be cached",
        "Ma et al. 2023, MedSAM, arXiv 2304.12306v1",
        True,
        "medsam_lora.peft.decoder_only",
    ),
    "lora": MethodSpec(
        "lora",
        "low-rank branches beside projections of the image encoder, and the mask decoder",
        "Hu et al. 2021, LoRA, arXiv 2106.09685; Zhang and Liu 2023, SAMed, arXiv 2304.13785",
        True,
        "medsam_lora.peft.lora",
        ("blocks", *DECODER_OPTIONS),
    ),
    "adapter": MethodSpec(
        "adapter",
        "serial bottlenecks after attention and perceptron of every block, and the mask decoder",
        "Houlsby et al. 2019, arXiv 1902.00751",
        False,
        "medsam_lora.peft.adapter",
        ("bottleneck", "blocks", *DECODER_OPTIONS),
    ),
    "adaptformer": MethodSpec(
        "adaptformer",
        "a bottleneck beside the perceptron of every block, and the mask decoder",
        "Chen et al. 2022, AdaptFormer, arXiv 2205.13535",
        False,
        "medsam_lora.peft.adaptformer",
        ("bottleneck", "adapter_scale", "blocks", *DECODER_OPTIONS),
    ),
    "prompt_generator": MethodSpec(
        "prompt_generator",
        "a convolutional branch in front of every block, and the mask decoder",
        "the Adapter of Peng et al. 2023, SAM-PARSER, arXiv 2308.14604, Table 4",
        False,
        "medsam_lora.peft.prompt_generator",
        ("bottleneck", "blocks", *DECODER_OPTIONS),
    ),
    "prefix": MethodSpec(
        "prefix",
        "gated keys and values beside the attention of every block, and the mask decoder",
        "Li and Liang 2021, arXiv 2101.00190; Zhang et al. 2023, LLaMA-Adapter, arXiv 2303.16199",
        False,
        "medsam_lora.peft.prefix",
        ("tokens", "blocks", *DECODER_OPTIONS),
    ),
    "vpt_deep": MethodSpec(
        "vpt_deep",
        "prompt tokens that every window of every block attends to, and the mask decoder",
        "Jia et al. 2022, VPT, arXiv 2203.12119",
        False,
        "medsam_lora.peft.vpt_deep",
        ("tokens", "blocks", *DECODER_OPTIONS),
        identity=False,
    ),
    "prompt_tokens": MethodSpec(
        "prompt_tokens",
        "prompt tokens in place of the box, and the mask decoder; needs no prompt",
        "Lester et al. 2021, prompt tuning, arXiv 2104.08691",
        False,
        "medsam_lora.peft.prompt_tokens",
        ("tokens", *DECODER_OPTIONS),
        identity=False,
        prompted=False,
    ),
    "sam_parser": MethodSpec(
        "sam_parser",
        "the singular values of the neck's convolutions, and the mask decoder",
        "Peng et al. 2023, SAM-PARSER, arXiv 2308.14604",
        True,
        "medsam_lora.peft.sam_parser",
        ("layers", "bases", "lr_singular", "blocks", *DECODER_OPTIONS),
    ),
    "bitfit": MethodSpec(
        "bitfit",
        "the biases of the image encoder, and the mask decoder",
        "Ben Zaken et al. 2021, BitFit, arXiv 2106.10199",
        True,
        "medsam_lora.peft.bitfit",
        DECODER_OPTIONS,
    ),
    "layernorm": MethodSpec(
        "layernorm",
        "the LayerNorms of the image encoder, and the mask decoder",
        "Basu et al. 2023, arXiv 2304.03094",
        True,
        "medsam_lora.peft.layernorm",
        DECODER_OPTIONS,
    ),
    "sd_trans": MethodSpec(
        "sd_trans",
        "attention over neighbouring slices and three adapters in every block, and the mask decoder",
        "Wu et al. 2023, Medical SAM Adapter, arXiv 2304.12620",
        False,
        "medsam_lora.peft.sd_trans",
        ("depth", "bottleneck", "blocks", *DECODER_OPTIONS),
    ),
    "full": MethodSpec(
        "full",
        "the whole image encoder and mask decoder; the prompt encoder stays frozen",
        "Ma et al. 2024, MedSAM, arXiv 2304.12306",
        True,
        "medsam_lora.peft.full",
    ),
}
"""The methods by name."""


def attach(model: nn.Module, config: MethodConfig, seed: int) -> Adaptation:
    """Attach a method to a model, in place.

    Afterwards exactly the tensors of ``Adaptation.report`` require gradients, and the model's output is what it was
    (for a method that declares so in `MethodSpec.identity`).

    Parameters
    ----------
    model : Module
        With `image_encoder`, `prompt_encoder` and `mask_decoder`; no other adaptation may be attached to it.
    config : MethodConfig
        The method's name, or several joined by ``+``, and options; options it does not read are ignored.
    seed : int
        Of its initialisation, the same for each of several methods. The global random state is neither read nor
        changed.

    Returns
    -------
    Adaptation

    Raises
    ------
    ConfigError
        Where no method has this name (the nearest one is named), an option does not suit the model, or methods that
        are to be combined train the same tensors.
    AdapterError
        Where another adaptation is attached already.
    """
    specs = [METHODS[name] for name in _names(config.name)]
    # torch and the method are imported here, so that listing the methods needs neither.
    import torch

    parts: list[Adaptation] = []
    for spec in specs:
        own = config if len(specs) == 1 else config.model_copy(update={"name": spec.name})
        generator = torch.Generator().manual_seed(seed)
        parts.append(import_module(spec.module).attach(model, own, generator))
        if len(specs) == 1:
            return parts[0]
        parts[-1].detach()
    from medsam_lora.peft.combine import combine

    return combine(model, config, parts)


def method_spec(name: str) -> MethodSpec:
    """The entry of a method, or of several joined by ``+``.

    Raises
    ------
    ConfigError
        Where no method has this name; the nearest one is named.

    Examples
    --------
    >>> method_spec("lora").mergeable
    True
    >>> method_spec("sam_parser+lora").options[:2]
    ('layers', 'bases')
    """
    specs = [METHODS[part] for part in _names(name)]
    if len(specs) == 1:
        return specs[0]
    return MethodSpec(
        name,
        "; ".join(spec.summary for spec in specs),
        "; ".join(spec.source for spec in specs),
        all(spec.mergeable for spec in specs),
        "medsam_lora.peft.combine",
        tuple(dict.fromkeys(option for spec in specs for option in spec.options)),
        all(spec.identity for spec in specs),
        all(spec.prompted for spec in specs),
    )


def _names(name: str) -> list[str]:
    names = [part.strip() for part in name.split("+")]
    for part in names:
        if part not in METHODS:
            guess = nearest(part, list(METHODS))
            hint = f"; did you mean {guess}?" if guess else ""
            raise ConfigError(
                f"unknown method {part!r}{hint}", remedy=f"Set method.name to one of {', '.join(METHODS)}."
            )
    if len(set(names)) != len(names):
        raise ConfigError(f"method.name is {name!r}: a method is named twice", remedy="Name each method once.")
    return names
