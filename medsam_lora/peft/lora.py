"""Low-rank adaptation of the image encoder's projections, beside the mask decoder.

``y = W x + s B A x`` (Hu et al. 2021, arXiv 2106.09685, section 4.1), A drawn as loralib draws it, B zero, so that the
adapted model starts as the base model. With the targets q and v in every block and the mask decoder trained it is SAMed
(arXiv 2304.13785); with ``decoder: lora`` its small variant. Weights are never merged in place: `merge` exports them
into a copy. The layers are in `low_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import (
    linear,
    low_rank_count,
    low_rank_group,
    low_rank_options,
    with_decoder,
)
from medsam_lora.peft.edits import Edit
from medsam_lora.peft.low_rank import PROJECTIONS, LoraLinear, LoraQkv, LowRankOptions
from medsam_lora.peft.sites import AttentionSite, MlpSite, cache_point_before, chosen_sites, mlp_sites

__all__ = ["LoraLinear", "LoraQkv", "LowRankOptions", "attach"]


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Put low-rank branches beside the chosen projections of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `rank`, `alpha`, `scaling`, `dropout`, `targets`, `blocks`, `dora`, `init`, `lora_plus`, `decoder`.
    generator : torch.Generator
        Of the A matrices, drawn in the order of blocks and targets.

    Raises
    ------
    ConfigError
        Where a block does not exist, a target is named twice, or options contradict each other.
    AdapterError
        Where the encoder does not say where its projections are.
    """
    options = low_rank_options(config)
    encoder = model.get_submodule("image_encoder")
    sites = chosen_sites(encoder, config.blocks)
    projections = [p for p in PROJECTIONS if p in config.targets]
    mlps = {site.block: site for site in mlp_sites(encoder)} if "mlp" in config.targets else {}
    group = low_rank_group("encoder", config)

    edits: list[Edit] = []
    count = 0
    for site in sites:
        if projections:
            base = linear(encoder, site.qkv)
            qkv = LoraQkv(base, site, projections, options, generator)
            edits.append(Edit(f"image_encoder.{site.qkv}", base, qkv, group))
            count += sum(low_rank_count(options, site.dim_in, len(site.rows(p))) for p in projections)
        for name in _whole_linears(site, mlps.get(site.block), config.targets):
            base = linear(encoder, name)
            edits.append(Edit(f"image_encoder.{name}", base, LoraLinear(base, options, generator), group))
            count += low_rank_count(options, base.in_features, base.out_features)
    # What runs before the first adapted block never changes.
    return with_decoder(model, config, generator, edits, count, cache_point=cache_point_before(sites))


def _whole_linears(site: AttentionSite, mlp: MlpSite | None, targets: Sequence[str]) -> list[str]:
    return [site.proj] * ("proj" in targets) + ([mlp.fc1, mlp.fc2] if mlp is not None else [])
