"""Low-rank branches beside frozen projections: the layers of `lora`.

``y = W x + s B A x`` (Hu et al. 2021, arXiv 2106.09685, section 4.1). With *DoRA* (Liu et al. 2024, arXiv 2402.09353,
equation 5) the rows of ``W + s B A`` are scaled to trained magnitudes m: ``y = m / |W + s B A| (W + s B A) x``. With
the start of *PiSSA* (Meng et al. 2024, arXiv 2404.02948) A and B begin at the largest singular values of W, and what
they begin at is taken off again: ``y = W x + s (B A - B0 A0) x``. W itself is never touched, and a dense ``B A`` is
formed by merging alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import loralib
import torch
from torch import Tensor, nn
from torch.nn import functional

from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft.full_precision import full_precision
from medsam_lora.peft.sites import AttentionSite, Projection, Rows

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class LowRankOptions:
    """What the branches are like.

    Parameters
    ----------
    rank : int
    alpha : float
    dropout : float
        On the input of the branch.
    scaling : {'alpha/r', 'alpha/sqrt(r)', 'none'}
        The scale s. The square root is rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732); none is s = 1.
    dora : bool
    init : {'kaiming', 'pissa'}
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "none"] = "alpha/r"
    dora: bool = False
    init: Literal["kaiming", "pissa"] = "kaiming"

    @property
    def scale(self) -> float:
        """The factor s of the branch.

        Examples
        --------
        >>> [LowRankOptions(16, 8.0, scaling=s).scale for s in ("alpha/r", "alpha/sqrt(r)", "none")]
        [0.5, 2.0, 1.0]
        """
        if self.scaling == "none":
            return 1.0
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))


class Branch:
    """The tensors of one branch, held by a layer under names with a prefix.

    Parameters
    ----------
    layer : Module
        Receives parameters ``A`` (rank, n_in) and ``B`` (n_out, rank), with DoRA ``magnitude`` (n_out,); and buffers
        that follow from the base's weight, so that they are not saved.
    prefix : str
        Of these names.
    options : LowRankOptions
    """

    def __init__(self, layer: nn.Module, prefix: str, options: LowRankOptions) -> None:
        self.layer, self.prefix, self.options = layer, prefix, options

    def create(self, weight: Tensor, generator: torch.Generator) -> None:
        """Make the tensors beside a weight (n_out, n_in).

        Raises
        ------
        ConfigError
            Where PiSSA is asked for more singular values than the weight has.
        """
        options, (n_out, n_in) = self.options, weight.shape
        if options.init == "pissa":
            a, b = _principal_pair(weight, options)
            self.layer.register_buffer(f"{self.prefix}start_A", a.clone(), persistent=False)
            self.layer.register_buffer(f"{self.prefix}start_B", b.clone(), persistent=False)
        else:
            # As loralib.Linear.reset_parameters, on the CPU so that a seed gives the same values on every device.
            a = nn.init.kaiming_uniform_(torch.empty(options.rank, n_in), a=math.sqrt(5), generator=generator)
            a, b = a.to(weight), weight.new_zeros(n_out, options.rank)
        self.layer.register_parameter(f"{self.prefix}A", nn.Parameter(a))
        self.layer.register_parameter(f"{self.prefix}B", nn.Parameter(b))
        if options.dora:
            squares = weight.detach().square().sum(dim=1)
            # Kept, not computed again: the factor at the start is then 1 to the last bit, on every device.
            self.layer.register_buffer(f"{self.prefix}squares", squares, persistent=False)
            self.layer.register_parameter(f"{self.prefix}magnitude", nn.Parameter(squares.sqrt()))

    def tensor(self, name: str) -> Tensor:
        """One of the tensors by its name without the prefix."""
        found: Tensor = getattr(self.layer, self.prefix + name)
        return found

    def delta(self, x: Tensor) -> Tensor:
        """``s B A x``, with PiSSA ``s (B A - B0 A0) x``, for x of shape (..., n_in)."""
        # The scale goes to the small B: one pass less over the tokens.
        out = functional.linear(functional.linear(x, self.tensor("A")), self.tensor("B") * self.options.scale)
        if self.options.init == "pissa":
            start = functional.linear(x, self.tensor("start_A"))
            # Two products and their difference, which is 0 to the last bit at the start.
            out = out - functional.linear(start, self.tensor("start_B") * self.options.scale)
        return out

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix of `delta`, (n_out, n_in), computed in a type."""
        dense = self.options.scale * self.tensor("B").to(dtype) @ self.tensor("A").to(dtype)
        if self.options.init == "pissa":
            dense = dense - self.options.scale * self.tensor("start_B").to(dtype) @ self.tensor("start_A").to(dtype)
        return dense

    def factor(self, weight: Tensor) -> Tensor | None:
        """What DoRA multiplies each row of ``W + s B A`` by, (n_out,); None without DoRA.

        For a row ``|w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b``: no (n_out, n_in) matrix is formed.
        """
        if not self.options.dora:
            return None
        with full_precision(weight):
            a, b = self.tensor("A").float(), self.tensor("B").float() * self.options.scale
            cross = (b * functional.linear(weight.float(), a)).sum(dim=1)
            own = (b @ (a @ a.T) * b).sum(dim=1)
            squares = self.tensor("squares") + 2 * cross + own
            # Rounding could make the square of a row that has nearly vanished negative.
            return self.tensor("magnitude") / squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def merged(self, weight: Tensor) -> Tensor:
        """The weight that does alone what weight and branch do together, of the weight's own type.

        It is rounded to that type once, at the end.
        """
        with full_precision(weight):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            factor = self.factor(weight)
            merged = weight.to(dtype) + self.dense(dtype)
            return (merged if factor is None else factor[:, None] * merged).detach().to(weight.dtype)


def with_branch(out: Tensor, delta: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """The output of a layer with a branch, from that of the base: ``factor * (out - bias + delta) + bias``.

    Parameters
    ----------
    out, delta : Tensor, shape (..., n)
    factor, bias : Tensor or None, shape (n,)
    """
    # Not in place on a Linear's output: that breaks under autocast.
    if factor is None:
        return out + delta
    plain = out if bias is None else out - bias.to(out.dtype)
    # Written as a change of `out`, which is exactly 0 where the factor is 1 and the branch 0.
    return out + (factor - 1).to(out.dtype) * plain + factor.to(out.dtype) * delta


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
        self.scaling = options.scale
        self.options = options
        self.branch.create(base.weight, generator)
        _replace_lambda(self, options.dropout)

    @property
    def branch(self) -> Branch:
        """The tensors ``lora_A``, ``lora_B`` and those that belong to them."""
        return Branch(self, "lora_", self.options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not self.options.dora and self.options.init == "kaiming":
            out: Tensor = super().forward(x)
            return out
        branch = self.branch
        out = functional.linear(x, self.weight, self.bias)
        return with_branch(out, branch.delta(self.lora_dropout(x)), branch.factor(self.weight), self.bias)

    def merged_state(self) -> dict[str, Tensor]:
        """The base's weight with the branch added."""
        return {"weight": self.branch.merged(self.weight)}


class LowRank(nn.Module):
    """The tensors of one projection of a fused Linear."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, options: LowRankOptions, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.options = options
        self.tensors.create(weight, generator)

    @property
    def tensors(self) -> Branch:
        """These tensors, and what is computed from them."""
        return Branch(self, "", self.options)


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
        self.scaling = options.scale
        self.projections = tuple(projections)
        self._rows: dict[Projection, Rows] = {"q": site.q, "k": site.k, "v": site.v}
        self._pieces = _pieces(site, base)
        _replace_lambda(self, options.dropout)
        for projection in self.projections:
            self.add_module(f"lora_{projection}", LowRank(options, self._weight_of(projection), generator))

    def branch(self, projection: Projection) -> LowRank:
        """The pair of one of `projections`."""
        module = self.get_submodule(f"lora_{projection}")
        assert isinstance(module, LowRank)
        return module

    def _weight_of(self, projection: Projection) -> Tensor:
        parts = [self.weight[rows.start : rows.stop] for rows in self._rows[projection]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, input: Tensor) -> Tensor:
        """Queries, keys and values, shape (..., dim_in) to (..., rows), laid out as the base's."""
        output = functional.linear(input, self.weight, self.bias)
        x = self.lora_dropout(input)
        branches = {p: self.branch(p).tensors for p in self.projections}
        deltas = {p: branch.delta(x) for p, branch in branches.items()}
        factors = {p: branch.factor(self._weight_of(p)) for p, branch in branches.items() if branch.options.dora}
        # Split, not sliced: the gradient of each slice would be a whole output of zeros, thirty of them for ten heads.
        wholes = output.split([length for length, _, _ in self._pieces], dim=-1)
        splits = {
            p: iter(delta.split([length for length, own, _ in self._pieces if own == p], dim=-1))
            for p, delta in deltas.items()
        }
        parts: list[Tensor] = []
        first = 0
        # No zeros are added to rows without a branch.
        for (length, p, start), part in zip(self._pieces, wholes, strict=True):
            if p in deltas:
                factor, bias = factors.get(p), None if self.bias is None else self.bias[first : first + length]
                own_factor = None if factor is None else factor[start : start + length]
                part = with_branch(part, next(splits[p]), own_factor, bias)
            parts.append(part)
            first += length
        return torch.cat(parts, dim=-1)

    def merged_state(self) -> dict[str, Tensor]:
        """The base's weight with the branches added to their rows."""
        weight = self.weight.detach().clone()
        for projection in self.projections:
            rows = [row for part in self._rows[projection] for row in part]
            weight[rows] = self.branch(projection).tensors.merged(self._weight_of(projection))
        return {"weight": weight}


def _principal_pair(weight: Tensor, options: LowRankOptions) -> tuple[Tensor, Tensor]:
    """A and B with ``s B A`` the best approximation of a weight by a matrix of this rank."""
    if options.rank > min(weight.shape):
        raise ConfigError(
            f"method.rank is {options.rank}, but a projection of {tuple(weight.shape)} has {min(weight.shape)} "
            "singular values",
            remedy=f"Set method.rank to {min(weight.shape)} or less, or method.init to kaiming.",
        )
    # In float64, and only the product is used of what is not trained: the start is the same wherever it is computed,
    # although the signs of singular vectors are not.
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = (s[: options.rank] / options.scale).sqrt()
    a, b = root[:, None] * vh[: options.rank], u[:, : options.rank] * root
    return a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()


def _pieces(site: AttentionSite, base: nn.Linear) -> tuple[tuple[int, Projection, int], ...]:
    """The fused output from its first row to its last: (length, projection, first row within that projection)."""
    found: list[tuple[range, Projection, int]] = []
    for projection in PROJECTIONS:
        done = 0
        for rows in {"q": site.q, "k": site.k, "v": site.v}[projection]:
            found.append((rows, projection, done))
            done += len(rows)
    found.sort(key=lambda piece: piece[0].start)
    every_row = [row for rows, _, _ in found for row in rows]
    if every_row != list(range(base.out_features)) or base.in_features != site.dim_in:
        raise AdapterError(f"{site.qkv} is {tuple(base.weight.shape)}: not what its encoder says of it")
    return tuple((len(rows), projection, start) for rows, projection, start in found)


def _replace_lambda(layer: nn.Module, dropout: float) -> None:
    # Without dropout loralib keeps a lambda as an attribute, which cannot be pickled.
    if dropout == 0:
        layer.lora_dropout = nn.Identity()
