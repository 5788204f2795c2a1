"""Where a method may attach to an image encoder: declared by the encoder, never guessed from module names.

SAM's own `ImageEncoderViT` is described here, since its class cannot be edited; any other encoder describes itself
with methods ``attention_sites()`` and ``mlp_sites()`` that return these records. Importing this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from medsam_lora.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from torch import nn

Projection: TypeAlias = Literal["q", "k", "v"]
Rows: TypeAlias = tuple[range, ...]


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention block of an image encoder.

    Parameters
    ----------
    block : int
        Position among the encoder's blocks that have attention, in the order they run, from 0. (TinyViT's leading
        convolution blocks are not counted.)
    qkv, proj : str
        Dotted names, within the encoder, of the Linear that gives queries, keys and values at once and of the one
        after the heads are joined.
    dim_in : int
        Input features of `qkv`.
    heads : int
    q, k, v : tuple of range
        Output rows of `qkv` that are queries, keys and values, in head order. Together they name each row once.
    global_attention : bool
        True where a token sees the whole image, False where it sees its window.
    name, attention, norm : str
        Dotted names of the block, which maps (B, H, W, C) to the same shape, of its attention, and of the LayerNorm in
        front of `qkv`. Methods that add to the Linears alone do without them.
    """

    block: int
    qkv: str
    proj: str
    dim_in: int
    heads: int
    q: Rows
    k: Rows
    v: Rows
    global_attention: bool
    name: str = ""
    attention: str = ""
    norm: str = ""

    def rows(self, projection: Projection) -> list[int]:
        """Output rows of `qkv` that hold one projection, in head order."""
        ranges = {"q": self.q, "k": self.k, "v": self.v}[projection]
        return list(chain.from_iterable(ranges))


@dataclass(frozen=True)
class MlpSite:
    """The two-layer perceptron of a block, by dotted names within the encoder.

    Parameters
    ----------
    block : int
        As of `AttentionSite`.
    fc1, fc2 : str
        Its Linears.
    name : str
        The perceptron itself.
    norm : str
        The LayerNorm that its `forward` begins with, if it does.
    """

    block: int
    fc1: str
    fc2: str
    name: str = ""
    norm: str = ""


def rows_as_thirds(dim: int) -> tuple[Rows, Rows, Rows]:
    """Rows of q, k, v where the fused output is [all q | all k | all v], as in SAM's `ImageEncoderViT`.

    Examples
    --------
    >>> rows_as_thirds(4)
    ((range(0, 4),), (range(4, 8),), (range(8, 12),))
    """
    return (range(dim),), (range(dim, 2 * dim),), (range(2 * dim, 3 * dim),)


def rows_per_head(heads: int, key_dim: int, value_dim: int | None = None) -> tuple[Rows, Rows, Rows]:
    """Rows of q, k, v where the fused output is [q k v of head 0 | q k v of head 1 | ...], as in TinyViT.

    Parameters
    ----------
    heads, key_dim : int
    value_dim : int, optional
        Features of a value; those of a key by default.

    Examples
    --------
    >>> rows_per_head(2, 3)
    ((range(0, 3), range(9, 12)), (range(3, 6), range(12, 15)), (range(6, 9), range(15, 18)))
    """
    value_dim = key_dim if value_dim is None else value_dim
    starts = [head * (2 * key_dim + value_dim) for head in range(heads)]
    return (
        tuple(range(s, s + key_dim) for s in starts),
        tuple(range(s + key_dim, s + 2 * key_dim) for s in starts),
        tuple(range(s + 2 * key_dim, s + 2 * key_dim + value_dim) for s in starts),
    )


def attention_sites(encoder: nn.Module) -> list[AttentionSite]:
    """Attention blocks of an image encoder, in the order they run.

    Raises
    ------
    AdapterError
        Where the encoder is neither SAM's `ImageEncoderViT` nor describes itself.
    """
    from medsam_lora.sam_modules import ImageEncoderViT

    if isinstance(encoder, ImageEncoderViT):
        return [_vit_attention(index, block) for index, block in enumerate(encoder.blocks)]
    return list(_declared(encoder, "attention_sites"))


def mlp_sites(encoder: nn.Module) -> list[MlpSite]:
    """Perceptrons of the attention blocks of an image encoder, in the order they run; see `attention_sites`."""
    from medsam_lora.sam_modules import ImageEncoderViT

    if isinstance(encoder, ImageEncoderViT):
        return [
            MlpSite(index, f"blocks.{index}.mlp.lin1", f"blocks.{index}.mlp.lin2", f"blocks.{index}.mlp")
            for index in range(len(encoder.blocks))
        ]
    return list(_declared(encoder, "mlp_sites"))


def convolution_sites(encoder: nn.Module, part: Literal["neck", "patch"]) -> list[str]:
    """Dotted names of the convolutions of the encoder's neck, or of its patch embedding, in the order they run."""
    from medsam_lora.sam_modules import ImageEncoderViT

    if isinstance(encoder, ImageEncoderViT):
        return ["neck.0", "neck.2"] if part == "neck" else ["patch_embed.proj"]
    return list(_declared(encoder, f"{part}_convolutions"))


def decoder_linears(decoder: nn.Module) -> dict[str, list[str]]:
    """The Linears of the transformer in SAM's mask decoder, as dotted names within it, by what they project.

    Keys are ``q``, ``k``, ``v``, ``proj`` (after the heads are joined) and ``mlp``, as of `method.targets`.
    """
    transformer = decoder.get_submodule("transformer")
    n_layers = len(list(transformer.get_submodule("layers").children()))
    layers = [f"transformer.layers.{i}" for i in range(n_layers)]
    kinds = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    attention = [f"{layer}.{kind}" for layer in layers for kind in kinds]
    attention.append("transformer.final_attn_token_to_image")
    found = {p: [f"{name}.{p}_proj" for name in attention] for p in ("q", "k", "v")}
    found["proj"] = [f"{name}.out_proj" for name in attention]
    found["mlp"] = [f"{layer}.mlp.{linear}" for layer in layers for linear in ("lin1", "lin2")]
    return found


def chosen_sites(encoder: nn.Module, blocks: Sequence[int] | str | None) -> list[AttentionSite]:
    """The attention blocks that `method.blocks` names, in the order they run.

    Parameters
    ----------
    encoder : Module
    blocks : sequence of int, str or None
        Indices, negative ones from the end; ``global``: those with global attention; ``last k``: the k last ones;
        None: all.

    Raises
    ------
    ConfigError
        Where there are no such blocks.
    """
    sites = attention_sites(encoder)
    if blocks == "global":
        found = [site for site in sites if site.global_attention]
        if not found:
            raise ConfigError(
                "method.blocks is global, but no block of this encoder has global attention",
                remedy="Name blocks by index, or write last k.",
            )
        return found
    if isinstance(blocks, str):
        k = int(blocks.removeprefix("last "))
        if k > len(sites):
            raise ConfigError(
                f"method.blocks is {blocks}, but the encoder has {len(sites)} attention blocks",
                remedy=f"Write last {len(sites)} or less, or null for all.",
            )
        blocks = list(range(-k, 0))
    return [sites[index] for index in select_blocks(blocks, len(sites))]


def cache_point_before(sites: Sequence[AttentionSite]) -> str | None:
    """The cache point of a method whose first change is within the first of some blocks, or before it.

    Before block 0 there is nothing that would be worth keeping.
    """
    return f"block {sites[0].block}" if sites[0].block > 0 else None


def select_blocks(blocks: Sequence[int] | None, n_blocks: int) -> list[int]:
    """Block indices as sorted, non-negative ones; None is all of them, negative ones count from the end.

    Raises
    ------
    ConfigError
        Where the list is empty, names a block twice, or one that does not exist.

    Examples
    --------
    >>> select_blocks([-1, 0], 12)
    [0, 11]
    """
    if blocks is None:
        return list(range(n_blocks))
    outside = [b for b in blocks if not -n_blocks <= b < n_blocks]
    if outside:
        raise ConfigError(
            f"method.blocks names {outside}, but the encoder has {n_blocks} attention blocks",
            remedy=f"Give indices from {-n_blocks} to {n_blocks - 1}, or null for all.",
        )
    chosen = sorted(b % n_blocks for b in blocks)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(
            f"method.blocks is {list(blocks)}: each block must be named once, and at least one",
            remedy="Name each block once, or use method.name=decoder_only to leave the encoder as it is.",
        )
    return chosen


def _vit_attention(index: int, block: Any) -> AttentionSite:
    attention = block.attn
    dim = attention.qkv.in_features
    q, k, v = rows_as_thirds(attention.qkv.out_features // 3)
    name = f"blocks.{index}.attn"
    # A window of 0 is upstream's way of saying "no windows".
    return AttentionSite(
        index,
        f"{name}.qkv",
        f"{name}.proj",
        dim,
        attention.num_heads,
        q,
        k,
        v,
        not block.window_size,
        f"blocks.{index}",
        name,
        f"blocks.{index}.norm1",
    )


def _declared(encoder: nn.Module, method: str) -> Sequence:
    describe = getattr(encoder, method, None)
    if describe is None:
        raise AdapterError(
            f"the encoder {type(encoder).__name__} does not say where a method may attach",
            remedy=f"Give it a method {method}() that returns records of medsam_lora.peft.sites.",
        )
    return describe()
