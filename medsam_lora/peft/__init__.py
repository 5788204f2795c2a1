"""The methods: ways to adapt a SAM model, all through one `Adaptation` contract.

Importing this package needs no torch. A method is one module with a function
``attach(model, config, generator) -> Adaptation`` and one entry of `METHODS`; `docs/extending.md` shows how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final

from medsam_lora.errors import ConfigError

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
    """

    name: str
    summary: str
    source: str
    mergeable: bool
    module: str
    options: tuple[str, ...] = ()


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
        ("rank", "alpha", "dropout", "targets", "blocks", "decoder"),
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

    Afterwards exactly the tensors of ``Adaptation.report`` require gradients, and the model's output is what it was.

    Parameters
    ----------
    model : Module
        With `image_encoder`, `prompt_encoder` and `mask_decoder`; no other adaptation may be attached to it.
    config : MethodConfig
        The method's name and options; options it does not read are ignored.
    seed : int
        Of its initialisation. The global random state is neither read nor changed.

    Returns
    -------
    Adaptation

    Raises
    ------
    ConfigError
        Where no method has this name (the nearest one is named), or an option does not suit the model.
    AdapterError
        Where another adaptation is attached already.
    """
    spec = method_spec(config.name)
    # torch and the method are imported here, so that listing the methods needs neither.
    import torch

    adaptation: Adaptation = import_module(spec.module).attach(model, config, torch.Generator().manual_seed(seed))
    return adaptation


def method_spec(name: str) -> MethodSpec:
    """The entry of a method.

    Raises
    ------
    ConfigError
        Where no method has this name; the nearest one is named.

    Examples
    --------
    >>> method_spec("lora").mergeable
    True
    """
    if name in METHODS:
        return METHODS[name]
    from medsam_lora.config import nearest

    guess = nearest(name, list(METHODS))
    hint = f"; did you mean {guess}?" if guess else ""
    raise ConfigError(f"unknown method {name!r}{hint}", remedy=f"Set method.name to one of {', '.join(METHODS)}.")
