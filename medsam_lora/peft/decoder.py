"""The mask decoder's share of a method: trained whole, by low-rank branches, or left as it is (`method.decoder`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft.contract import Adaptation, GroupRule
from medsam_lora.peft.edits import Edit, train_whole
from medsam_lora.peft.low_rank import LoraLinear, LowRankOptions
from medsam_lora.peft.sites import decoder_linears


def decoder_part(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> tuple[list[Edit], int]:
    """Edits of ``mask_decoder`` and the number of parameters they train, by closed form.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `decoder`, and for low-rank branches the options of `lora`. `blocks` says nothing of the decoder.
    generator : torch.Generator
    """
    decoder = model.get_submodule("mask_decoder")
    if config.decoder == "frozen":
        return [], 0
    if config.decoder == "full":
        return train_whole(model, "mask_decoder", "decoder"), sum(p.numel() for p in decoder.parameters())
    options = low_rank_options(config)
    linears = decoder_linears(decoder)
    edits: list[Edit] = []
    count = 0
    for name in (name for target in linears if target in config.targets for name in linears[target]):
        base = linear(decoder, name)
        layer = LoraLinear(base, options, generator)
        edits.append(Edit(f"mask_decoder.{name}", base, layer, low_rank_group("decoder", config)))
        count += low_rank_count(options, base.in_features, base.out_features)
    return edits, count


def with_decoder(
    model: nn.Module,
    config: MethodConfig,
    generator: torch.Generator,
    edits: Sequence[Edit],
    count: int,
    *,
    cache_point: str | None = None,
    depth: int = 1,
    rules: Mapping[str, GroupRule] | None = None,
) -> Adaptation:
    """Attach a method's own edits and the mask decoder's share (`decoder_part`).

    Parameters
    ----------
    model : Module
    config : MethodConfig
    generator : torch.Generator
    edits : sequence of Edit
        Of the method, the decoder's not among them.
    count : int
        Parameters that those train, by the method's closed form.
    cache_point, depth, rules
        See `Adaptation`; the rules of low-rank branches (`low_rank_rules`) are added.
    """
    of_decoder, decoder_count = decoder_part(model, config, generator)
    return Adaptation(
        model,
        config,
        [*edits, *of_decoder],
        expected_count=count + decoder_count,
        cache_point=cache_point,
        depth=depth,
        rules={**low_rank_rules(config), **(rules or {})},
    )


def low_rank_options(config: MethodConfig) -> LowRankOptions:
    """What the settings say of low-rank branches.

    Raises
    ------
    ConfigError
        Where they contradict each other.
    """
    if config.dora and config.init == "pissa":
        raise ConfigError("method.dora and method.init=pissa exclude each other", remedy="Choose one of them.")
    if len(set(config.targets)) != len(config.targets):
        raise ConfigError(f"method.targets names a target twice: {config.targets}", remedy="Name each target once.")
    return LowRankOptions(config.rank, config.alpha, config.dropout, config.scaling, config.dora, config.init)


def low_rank_count(options: LowRankOptions, n_in: int, n_out: int) -> int:
    """Parameters of one branch: A and B, with DoRA also a magnitude for each output feature."""
    return options.rank * (n_in + n_out) + (n_out if options.dora else 0)


def low_rank_group(part: str, config: MethodConfig) -> str | Callable[[str], str]:
    """The learning-rate group of a branch's tensors: those of PiSSA have one of their own, with LoRA+ a B as well."""
    others = f"{part}.pissa" if config.init == "pissa" else part
    if config.lora_plus == 1:
        return others
    return lambda name: f"{part}.B" if name.endswith(("lora_B", ".B")) else others


def low_rank_rules(config: MethodConfig) -> dict[str, GroupRule]:
    """The rules of the groups of `low_rank_group`.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A by a fixed ratio. PiSSA: A and B hold a part of
    the base's weights, which weight decay would shrink.
    """
    decay = config.init != "pissa"
    rules = {}
    for part in ("encoder", "decoder"):
        if not decay:
            rules[f"{part}.pissa"] = GroupRule(weight_decay=False)
        if config.lora_plus != 1:
            rules[f"{part}.B"] = GroupRule(lr_factor=config.lora_plus, weight_decay=decay)
    return rules


def linear(part: nn.Module, name: str) -> nn.Linear:
    """The Linear of this name within a part of the model.

    Raises
    ------
    AdapterError
        Where something else is there.
    """
    module = part.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"{name} is a {type(module).__name__}, not a Linear")
    return module
