"""Low-rank adaptation of the image encoder's projections, beside the mask decoder.

``y = W x + (alpha / rank) B A x`` (Hu et al. 2021, arXiv 2106.09685, section 4.1), A drawn as loralib draws it, B zero,
so that the adapted model starts as the base model. With the targets q and v in every block and the mask decoder
trained it is SAMed (arXiv 2304.13785). Weights are never merged in place: `merge` exports them into a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import loralib
import torch
from torch import Tensor, nn
from torch.nn import functional

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.edits import Edit, train_whole
from medsam_lora.peft.sites import AttentionSite, MlpSite, Projection, attention_sites, mlp_sites, select_blocks

_PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class LowRankOptions:
    """Rank, numerator of the scale ``alpha / rank``, and dropout on the input of the branch."""

    rank: int
    alpha: float
    dropout: float = 0.0


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Put low-rank branches beside the chosen projections of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `rank`, `alpha`, `dropout`, `targets`, `blocks`; `decoder` is ``full`` (trained) or ``frozen``.
    generator : torch.Generator
        Of the A matrices, drawn in the order of blocks and targets.

    Raises
    ------
    ConfigError
        Where a block does not exist or a target is named twice.
    AdapterError
        Where the encoder does not say where its projections are.
    """
    if len(set(config.targets)) != len(config.targets):
        raise ConfigError(f"method.targets names a target twice: {config.targets}", remedy="Name each target once.")
    encoder = model.get_submodule("image_encoder")
    attention = attention_sites(encoder)
    chosen = select_blocks(config.blocks, len(attention))
    options = LowRankOptions(config.rank, config.alpha, config.dropout)
    projections = [p for p in _PROJECTIONS if p in config.targets]
    mlps = {site.block: site for site in mlp_sites(encoder)} if "mlp" in config.targets else {}

    edits: list[Edit] = []
    count = 0
    for site in (attention[index] for index in chosen):
        if projections:
            qkv = LoraQkv(_linear(encoder, site.qkv), site, projections, options, generator)
            edits.append(_edit(encoder, site.qkv, qkv))
            count += sum(config.rank * (site.dim_in + len(site.rows(p))) for p in projections)
        for name in _whole_linears(site, mlps.get(site.block), config.targets):
            base = _linear(encoder, name)
            edits.append(_edit(encoder, name, LoraLinear(base, options, generator)))
            count += config.rank * (base.in_features + base.out_features)
    if config.decoder == "full":
        edits += train_whole(model, "mask_decoder", "decoder")
        count += sum(p.numel() for p in model.get_submodule("mask_decoder").parameters())
    # What runs before the first adapted block never changes; before block 0 there is nothing worth keeping.
    cache_point = f"block {chosen[0]}" if chosen[0] > 0 else None
    return Adaptation(model, config, edits, expected_count=count, cache_point=cache_point)


class LoraLinear(loralib.Linear):
    """loralib's Linear around the weight of an existing one, drawing from its own generator.

    Parameters
    ----------
    base : Linear
        Its weight and bias are shared, not copied.
    options : LowRankOptions
    generator : torch.Generator
    """

    def __init__(self, base: nn.Linear, options: LowRankOptions, generator: torch.Generator) -> None:
        # On the meta device loralib's constructor neither draws from the global generator nor allocates a weight.
        super().__init__(
            base.in_features,
            base.out_features,
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            merge_weights=False,  # the default edits the frozen weight at every eval() and train()
            bias=base.bias is not None,
            device="meta",
        )
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(_initial_a(options.rank, base.in_features, generator).to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, options.rank))
        _replace_lambda(self, options.dropout)

    def merged_state(self) -> dict[str, Tensor]:
        """The base's weight with the branch added."""
        return {"weight": (self.weight + self.scaling * self.lora_B @ self.lora_A).detach()}


class LowRank(nn.Module):
    """The pair A, B of one projection.

    Parameters
    ----------
    n_in, n_out : int
    rank : int
    like : Tensor
        Gives device and type.
    generator : torch.Generator
    """

    def __init__(self, n_in: int, n_out: int, rank: int, like: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.A = nn.Parameter(_initial_a(rank, n_in, generator).to(like))
        self.B = nn.Parameter(like.new_zeros(n_out, rank))

    def forward(self, x: Tensor, scaling: float) -> Tensor:
        """``scaling * B A x`` for x of shape (..., n_in)."""
        # The scale goes to the small B: one pass less over the tokens.
        return functional.linear(functional.linear(x, self.A), self.B * scaling)


class LoraQkv(nn.Linear, loralib.LoRALayer):
    """A fused qkv Linear with low-rank branches on some of its projections.

    loralib's own layer for this, MergedLinear, would form the dense delta at every step (2.6 times the cost of the
    frozen layer instead of 1.2) and knows equal thirds only.

    Parameters
    ----------
    base : Linear
        Its weight and bias are shared, not copied.
    site : AttentionSite
        Which output rows are queries, keys and values.
    projections : sequence of {'q', 'k', 'v'}
    options : LowRankOptions
    generator : torch.Generator
    """

    lora_dropout: nn.Module

    def __init__(
        self,
        base: nn.Linear,
        site: AttentionSite,
        projections: Sequence[Projection],
        options: LowRankOptions,
        generator: torch.Generator,
    ) -> None:
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        loralib.LoRALayer.__init__(self, options.rank, options.alpha, options.dropout, merge_weights=False)
        self.weight, self.bias = base.weight, base.bias
        self.scaling = options.alpha / options.rank
        self.projections = tuple(projections)
        _replace_lambda(self, options.dropout)
        for projection in self.projections:
            n_out = len(site.rows(projection))
            branch = LowRank(base.in_features, n_out, options.rank, base.weight, generator)
            self.add_module(f"lora_{projection}", branch)
        self._pieces = _pieces(site, base)

    def branch(self, projection: Projection) -> LowRank:
        """The pair of one of `projections`."""
        module = self.get_submodule(f"lora_{projection}")
        assert isinstance(module, LowRank)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Queries, keys and values, shape (..., dim_in) to (..., rows), laid out as the base's."""
        output = functional.linear(input, self.weight, self.bias)
        x = self.lora_dropout(input)
        deltas = {p: self.branch(p)(x, self.scaling) for p in self.projections}
        # Not in place on the Linear's output (that breaks under autocast), and no zeros added to rows without a branch.
        parts = output.split([length for length, _, _ in self._pieces], dim=-1)
        return torch.cat(
            [
                part + deltas[p][..., start : start + length] if p in deltas else part
                for part, (length, p, start) in zip(parts, self._pieces, strict=True)
            ],
            dim=-1,
        )

    def merged_state(self) -> dict[str, Tensor]:
        """The base's weight with the branches added to their rows."""
        zeros = self.weight.new_zeros(0, self.in_features)
        deltas = {p: self.scaling * self.branch(p).B @ self.branch(p).A for p in self.projections}
        rows = [
            deltas[p][start : start + length] if p in deltas else zeros.new_zeros(length, self.in_features)
            for length, p, start in self._pieces
        ]
        return {"weight": (self.weight + torch.cat(rows)).detach()}


def _pieces(site: AttentionSite, base: nn.Linear) -> tuple[tuple[int, Projection, int], ...]:
    """The fused output from its first row to its last: (length, projection, first row within that projection)."""
    found: list[tuple[range, Projection, int]] = []
    for projection in _PROJECTIONS:
        done = 0
        for rows in {"q": site.q, "k": site.k, "v": site.v}[projection]:
            found.append((rows, projection, done))
            done += len(rows)
    found.sort(key=lambda piece: piece[0].start)
    every_row = [row for rows, _, _ in found for row in rows]
    if every_row != list(range(base.out_features)) or base.in_features != site.dim_in:
        raise AdapterError(f"{site.qkv} is {tuple(base.weight.shape)}: not what its encoder says of it")
    return tuple((len(rows), projection, start) for rows, projection, start in found)


def _initial_a(rank: int, n_in: int, generator: torch.Generator) -> Tensor:
    # As loralib.Linear.reset_parameters, on the CPU so that a seed gives the same values on every device.
    return nn.init.kaiming_uniform_(torch.empty(rank, n_in), a=math.sqrt(5), generator=generator)


def _replace_lambda(layer: nn.Module, dropout: float) -> None:
    # Without dropout loralib keeps a lambda as an attribute, which cannot be pickled.
    if dropout == 0:
        layer.lora_dropout = nn.Identity()


def _whole_linears(site: AttentionSite, mlp: MlpSite | None, targets: Sequence[str]) -> list[str]:
    return [site.proj] * ("proj" in targets) + ([mlp.fc1, mlp.fc2] if mlp is not None else [])


def _linear(encoder: nn.Module, name: str) -> nn.Linear:
    module = encoder.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"image_encoder.{name} is a {type(module).__name__}, not a Linear")
    return module


def _edit(encoder: nn.Module, name: str, adapted: nn.Module) -> Edit:
    return Edit(f"image_encoder.{name}", encoder.get_submodule(name), adapted, "encoder")
