"""Train the singular values of convolutions of the image encoder: 512 numbers in all.

A weight of shape (o, i, kh, kw) is a matrix M of (o, i kh kw) with ``M = U diag(S) Vh``. U and Vh, the bases, stay;
their coefficients S become ``S (1 + d)`` with d trained from 0 (Peng et al. 2023, SAM-PARSER, arXiv 2308.14604, section
3.2). The layers of the paper are the two convolutions of the neck, each of rank 256.

Other than in the published version, whose forward is three convolutions (0.54 GMAC more), the weight is put together
and used in one; coefficients are relative, since an absolute step of 1e-6 moves none of them; and no weight decay pulls
them to zero. They have a learning rate of their own (`method.lr_singular`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft.contract import Adaptation, GroupRule
from medsam_lora.peft.decoder import with_decoder
from medsam_lora.peft.edits import Edit, extend
from medsam_lora.peft.full_precision import full_precision
from medsam_lora.peft.sites import cache_point_before, chosen_sites, convolution_sites, mlp_sites

GROUP, BASES = "encoder.singular", "encoder.bases"


class Reconstructed(nn.Module):
    """A Linear or convolution whose singular values are trained: mixed into the base's class by `extend`.

    The weight is ``W + (U S d) Vh``, which is ``(U S (1 + d)) Vh`` but exactly W where d is 0. Where the bases are
    trained as well it is ``W + (U S (1 + d)) Vh - (U0 S) Vh0``.
    """

    weight: Tensor
    bias: Tensor | None
    singular_delta: nn.Parameter
    singular_u: Tensor
    singular_vh: Tensor
    singular_values: Tensor
    singular_start: Tensor | None

    def reconstructed(self) -> Tensor:
        """The weight, in the base's shape."""
        with full_precision(self.weight):
            if self.singular_start is None:
                change = (self.singular_u * (self.singular_values * self.singular_delta)) @ self.singular_vh
            else:
                scaled = self.singular_u * (self.singular_values * (1 + self.singular_delta))
                change = scaled @ self.singular_vh - self.singular_start
            return self.weight + change.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """As the base's."""
        weight = self.reconstructed()
        if isinstance(self, nn.Conv2d):
            out: Tensor = self._conv_forward(x, weight, self.bias)
            return out
        return functional.linear(x, weight, self.bias)

    def merged_state(self) -> dict[str, Tensor]:
        """The weight that was put together."""
        return {"weight": self.reconstructed().detach()}


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Train singular values of chosen layers of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `layers`, `bases`, `lr_singular`, `decoder`; `blocks` for the Linears.
    generator : torch.Generator
        Drawn from for low-rank branches of the decoder alone.

    Raises
    ------
    ConfigError
        Where a layer is named twice.
    """
    if len(set(config.layers)) != len(config.layers):
        raise ConfigError(f"method.layers names a layer twice: {config.layers}", remedy="Name each once.")
    encoder = model.get_submodule("image_encoder")
    names: list[str] = []
    cache_point: str | None = "trunk"
    if "linears" in config.layers:
        sites = chosen_sites(encoder, config.blocks)
        mlps = {site.block: site for site in mlp_sites(encoder)}
        for site in sites:
            names += [site.qkv, site.proj, mlps[site.block].fc1, mlps[site.block].fc2]
        cache_point = cache_point_before(sites)
    if "neck" in config.layers:
        names += convolution_sites(encoder, "neck")
    if "patch" in config.layers:
        names += convolution_sites(encoder, "patch")
        cache_point = None
    edits: list[Edit] = []
    count = 0
    for name in names:
        base = encoder.get_submodule(name)
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise AdapterError(f"image_encoder.{name} is a {type(base).__name__}, neither a Linear nor a convolution")
        adapted = _decompose(base, config.bases)
        edits.append(Edit(f"image_encoder.{name}", base, adapted, _group))
        n_out, n_in = base.weight.shape[0], base.weight[0].numel()
        rank = min(n_out, n_in)
        count += rank + (rank * (n_out + n_in) if config.bases else 0)
    return with_decoder(
        model,
        config,
        generator,
        edits,
        count,
        cache_point=cache_point,
        # Decay would shrink what the bases hold: the weights of the base model.
        rules={GROUP: GroupRule(lr=config.lr_singular, weight_decay=False), BASES: GroupRule(weight_decay=False)},
    )


def _group(name: str) -> str:
    return GROUP if name == "singular_delta" else BASES


def _decompose(base: nn.Linear | nn.Conv2d, bases: bool) -> Reconstructed:
    adapted = extend(base, Reconstructed)
    matrix = base.weight.detach().flatten(1)
    # In float64: what is saved are the changes, and the bases must be the same wherever they are computed again. A sign
    # that u and v change together makes no difference.
    parts = torch.linalg.svd(matrix.double(), full_matrices=False)
    u, values, vh = (part.to(matrix.dtype).contiguous() for part in parts)
    adapted.register_buffer("singular_values", values, persistent=False)
    adapted.register_parameter("singular_delta", nn.Parameter(torch.zeros_like(values)))
    adapted.register_buffer("singular_start", (u * values) @ vh if bases else None, persistent=False)
    for name, basis in (("singular_u", u), ("singular_vh", vh)):
        if bases:
            adapted.register_parameter(name, nn.Parameter(basis))
        else:
            adapted.register_buffer(name, basis, persistent=False)
    return adapted
