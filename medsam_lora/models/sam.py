"""SAM as one differentiable function: B images with any number of boxes each.

The sub-modules and their weights are segment_anything's own (for `vit_t`, MobileSAM's encoder); what differs from
upstream's `Sam.forward` is that gradients flow, that images of one batch keep their own prompts (upstream repeats every
image by the number of prompts), and that all four mask tokens come back. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsam_lora.errors import ConfigError
from medsam_lora.io.files import sha256_of
from medsam_lora.models import nano, tiny_vit
from medsam_lora.models.input_spec import PIXEL_MEAN, PIXEL_STD
from medsam_lora.models.nano import nano_encoder, scatter_positions
from medsam_lora.models.precision import float32_products
from medsam_lora.models.tiny_vit import TinyViT
from medsam_lora.models.vit import GridEncoder
from medsam_lora.models.weights import check_state, fetch, load_state, locate, model_spec, sha256_of_state
from medsam_lora.sam_modules import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
)

PATCH: Final = 16
"""Pixels per cell of the embedding in the official models; sides of images are multiples of it in all."""

SMALLEST_SIZE: Final = 32
LARGEST_SIZE: Final = 4096

Parts = tuple[nn.Module, PromptEncoder, MaskDecoder]


class SamModel(nn.Module):
    """An image encoder, a prompt encoder and a mask decoder; the state dict has the names of the official checkpoints.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    image_encoder : Module
        (B, 3, S, S) to (B, D, S/P, S/P) for patches of P pixels: 16 but for `vit_nano`.
    prompt_encoder : PromptEncoder
    mask_decoder : MaskDecoder
    image_size : int
        S, the side of the model frame in pixels.
    base_sha256 : str
        Hash of the checkpoint file, or of the tensors of random weights; it names the base of an adapter.
    grid : str
        ``padded``: images fill the frame; ``unpadded``: they may be any part of it in whole patches.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        name: str,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        image_size: int,
        base_sha256: str = "",
        grid: str = "padded",
    ) -> None:
        super().__init__()
        self.name = name
        self.grid = grid
        self.image_size = image_size
        self.base_sha256 = base_sha256
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(-1, 1, 1), persistent=False)

    @property
    def patch(self) -> int:
        """Pixels per cell of the embedding, along each side."""
        return self.prompt_encoder.input_image_size[0] // self.prompt_encoder.image_embedding_size[0]

    def encode(self, pixels: Tensor) -> Tensor:
        """Image embeddings.

        Parameters
        ----------
        pixels : Tensor of float, shape (B, 3, S, S)
            Model frame, normalised with `pixel_mean` and `pixel_std`, padded with zeros after that. On the unpadded
            grid (B, 3, h, w), the frame's upper left part.

        Returns
        -------
        Tensor of float, shape (B, D, S/P, S/P) or (B, D, h/P, w/P)
            P is `patch`.

        Raises
        ------
        ValueError
            For another shape: the positions of the encoder belong to one size.
        """
        size = self.image_size
        part = self.grid == "unpadded" and all(n % PATCH == 0 and 0 < n <= size for n in pixels.shape[2:])
        if pixels.shape[1:] != (3, size, size) and not (part and pixels.shape[1] == 3 and pixels.ndim == 4):
            sides = "sides up to that in steps of 16" if self.grid == "unpadded" else "both sides full"
            raise ValueError(f"pixels of shape {tuple(pixels.shape)}; need (B, 3, {size}, {size}), {sides}")
        return self.image_encoder(pixels)

    def decode(
        self,
        embedding: Tensor,
        boxes: Tensor | None,
        counts: Sequence[int] | None = None,
        points: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of every mask token for every prompt.

        Parameters
        ----------
        embedding : Tensor of float, shape (B, D, h, w)
            From `encode`.
        boxes : Tensor of float, shape (N, 4), or None
            XYXY in model pixels, the first image's boxes first. None, without points, is SAM without a prompt, once per
            image.
        counts : sequence of B int, optional
            Prompts of each image, summing to N; one each by default.
        points : tuple of Tensor, optional
            XY of points in model pixels, float, shape (N, P, 2), and their labels, shape (N, P): 1 inside the object, 0
            outside. With boxes they belong to the same N prompts.

        Returns
        -------
        logits : Tensor of float, shape (N, 4, 4 h, 4 w)
            On the decoder grid, which covers what was encoded: the whole model frame, unless unpadded. Token 0 is the
            mask for an unambiguous prompt (`multimask_output=False` upstream), 1-3 are the three for an ambiguous one.
        iou : Tensor of float, shape (N, 4)
            The decoder's estimate of each mask's IoU.

        Raises
        ------
        ValueError
            Where prompts and counts do not fit the embedding.
        """
        counts = [1] * len(embedding) if counts is None else list(counts)
        unprompted = boxes is None and points is None
        # Not len(), which would make the number of prompts a constant of an exported graph.
        given = [part.shape[0] for part in (boxes, *(points or ())) if part is not None]
        n_prompts = given[0] if given else len(embedding)
        each_one = all(count == 1 for count in counts)
        if (
            len(counts) != len(embedding)
            or sum(counts) != n_prompts
            or any(n != n_prompts for n in given)
            or (unprompted and not each_one)
        ):
            raise ValueError(f"{n_prompts} prompts, counted {counts}, do not fit {len(embedding)} images")
        sparse, dense, positions = self._encode_prompts(boxes, points)
        # Of the whole frame, in whose pixels prompts are given as well, the part that was encoded.
        positions = positions[..., : embedding.shape[-2], : embedding.shape[-1]]
        if unprompted:
            sparse = sparse.expand(n_prompts, -1, -1)
        if len(embedding) == 1:
            embedding = embedding.expand(n_prompts, -1, -1, -1)
        elif not each_one:
            embedding = embedding.repeat_interleave(torch.tensor(counts, device=embedding.device), dim=0)
        return self._predict_masks(embedding + dense, positions, sparse)

    def forward(
        self, pixels: Tensor, boxes: Tensor | None, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`decode` of `encode`: see there."""
        return self.decode(self.encode(pixels), boxes, counts)

    def _encode_prompts(
        self, boxes: Tensor | None, points: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # In half precision the Fourier features of a coordinate would be off by pixels: 2^-8 of a 1024 px frame is 4.
        device = self.pixel_mean.device
        with torch.autocast(device.type, enabled=False), float32_products(device, "none"):
            boxes = None if boxes is None else boxes.float()
            points = None if points is None else (points[0].float(), points[1])
            sparse, _ = self.prompt_encoder(points=points, boxes=boxes, masks=None)
            positions = self.prompt_encoder.get_dense_pe()
        # Upstream's dense embedding without a mask prompt, left to broadcast over prompts and cells.
        return sparse, self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1), positions

    def _predict_masks(self, source: Tensor, positions: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """Upstream's `MaskDecoder.predict_masks`, but for the repetition of images (segment_anything 1.0)."""
        decoder = self.mask_decoder
        n_prompts, dim, height, width = source.shape
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(n_prompts, -1, -1), sparse], dim=1)
        states, source = decoder.transformer(source, positions.expand(n_prompts, -1, -1, -1), tokens)
        n_masks = decoder.num_mask_tokens
        mask_states = states[:, 1 : 1 + n_masks]
        pixels = decoder.output_upscaling(source.transpose(1, 2).reshape(n_prompts, dim, height, width))
        kernels = [mlp(mask_states[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        logits = (torch.stack(kernels, dim=1) @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        return logits, decoder.iou_prediction_head(states[:, 0])


def build(
    name: str,
    weights: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
    *,
    grid: str = "padded",
    attention: str = "auto",
) -> SamModel:
    """A base model in evaluation mode, on the CPU, all of it trainable.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    weights : str, optional
        ``official`` (found on this machine, else downloaded; of `vit_nano` those in this package), which is the
        default, ``random``, or the path of a checkpoint with the same tensors.
    image_size : int, optional
        Side of the model frame in pixels: a multiple of 16 from 32 to 4096; the model's own by default. At another
        size the position tables of a ViT are interpolated, once, here (`fit_positions`); `vit_t` has none that
        depend on it.
    seed : int
        Of random weights; the global generator is left as it was.
    grid : {"padded", "unpadded"}
        Whether images fill the model frame; see `SamModel`.
    attention : str
        ``auto`` or a key of `attention_choice.ATTENTIONS`; it holds for a ViT, `vit_t` has one way.

    Returns
    -------
    SamModel

    Raises
    ------
    ConfigError
        For an image size that is not allowed, or upstream's attention on the unpadded grid.
    WeightsError
        For an unknown model, or weights that are missing, damaged, or of another model.
    """
    spec = model_spec(name)
    check_attention(name, grid, attention)
    size = _checked_size(spec.image_size if image_size is None else image_size)
    state, digest, path = _read(name, weights or "official")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the GPUs as well.
        torch.default_generator.manual_seed(seed)
        encoder, prompt_encoder, decoder = ARCHITECTURES[name]()
        if state is None and isinstance(encoder, ImageEncoderViT):
            scatter_positions(encoder)
    model = SamModel(name, encoder, prompt_encoder, decoder, spec.image_size, grid=grid)
    if state is None:
        model.base_sha256 = sha256_of_state(model.state_dict())
    else:
        if name != "vit_t":
            fit_positions(model, _size_of(state, spec.image_size, model.patch))
        dropped = tiny_vit.DROPPED_KEYS if name == "vit_t" else ()
        model.load_state_dict(check_state(state, model.state_dict(), dropped, path))
        model.base_sha256 = digest
    fit_positions(model, size)
    if isinstance(encoder, ImageEncoderViT):
        model.image_encoder = GridEncoder(encoder, attention)
    return model.eval()


def check_attention(name: str, grid: str, attention: str) -> None:
    """Refuse upstream's attention on the unpadded grid.

    Parameters
    ----------
    name, grid, attention : str
        See `build`.

    Raises
    ------
    ConfigError
    """
    if grid == "unpadded" and attention == "reference" and name != "vit_t":
        raise ConfigError(
            "model.attention=reference is segment_anything's own code, which stretches relative positions over an "
            "unpadded grid instead of taking the part that belongs there",
            remedy="Set model.attention=auto, or model.grid=padded.",
        )


def blank(name: str, image_size: int | None = None, *, grid: str = "padded", attention: str = "auto") -> SamModel:
    """A model with whatever its constructors leave in its tensors: for counting, where values do not matter.

    Parameters
    ----------
    name, image_size, grid, attention
        See `build`.
    """
    spec = model_spec(name)
    model = SamModel(name, *ARCHITECTURES[name](), spec.image_size, grid=grid)
    fit_positions(model, _checked_size(spec.image_size if image_size is None else image_size))
    if isinstance(model.image_encoder, ImageEncoderViT):
        model.image_encoder = GridEncoder(model.image_encoder, attention)
    return model.eval()


def fit_positions(model: SamModel, image_size: int) -> None:
    """Give a model another image size, in place; nothing happens where it has that size already.

    Absolute positions are interpolated bicubically as a (g, g) image. The relative positions of blocks with global
    attention are interpolated linearly from 2 g - 1 to 2 g' - 1 rows: what upstream's `get_rel_pos` would do at
    every forward, done once, so that a stored table means the same whatever runs it. Windowed blocks are not touched.

    `vit_nano` was trained at several sizes with tables that are cut for a smaller one, their middle kept: a distance of
    one token means the same at each. It is given them in that way.
    """
    if image_size == model.image_size:
        return
    grid = image_size // model.patch
    encoder, prompt_encoder = model.image_encoder, model.prompt_encoder
    if isinstance(encoder, ImageEncoderViT):
        with torch.no_grad():
            table = encoder.pos_embed.permute(0, 3, 1, 2)
            table = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
            encoder.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1).contiguous())
            for block in encoder.blocks:
                if block.window_size == 0:
                    fitted = _cut if model.name == "vit_nano" else _stretched
                    block.attn.rel_pos_h = nn.Parameter(fitted(block.attn.rel_pos_h, 2 * grid - 1))
                    block.attn.rel_pos_w = nn.Parameter(fitted(block.attn.rel_pos_w, 2 * grid - 1))
    encoder.img_size = image_size  # type: ignore[assignment]
    prompt_encoder.input_image_size = (image_size, image_size)
    prompt_encoder.image_embedding_size = (grid, grid)
    prompt_encoder.mask_input_size = (4 * grid, 4 * grid)
    model.image_size = image_size


def _stretched(table: Tensor, rows: int) -> Tensor:
    return F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T.contiguous()


def _cut(table: Tensor, rows: int) -> Tensor:
    """The middle of a table; a longer one than there is has to be stretched."""
    spare = len(table) - rows
    return table[spare // 2 : spare // 2 + rows].clone() if spare >= 0 else _stretched(table, rows)


def _checked_size(image_size: int) -> int:
    if image_size % PATCH or not SMALLEST_SIZE <= image_size <= LARGEST_SIZE:
        nearest = min(max(round(image_size / PATCH) * PATCH, SMALLEST_SIZE), LARGEST_SIZE)
        raise ConfigError(
            f"model.image_size is {image_size}: it must be a multiple of {PATCH} "
            f"from {SMALLEST_SIZE} to {LARGEST_SIZE}",
            remedy=f"Use {nearest}.",
        )
    return image_size


def _size_of(state: Mapping[str, Tensor], native: int, patch: int) -> int:
    """The image size a ViT checkpoint was saved at: a merged model may have been trained at its own."""
    table = state.get("image_encoder.pos_embed")
    if table is None or table.ndim != 4 or table.shape[1] != table.shape[2]:
        return native  # check_state will say what is wrong
    return table.shape[1] * patch


def _read(name: str, weights: str) -> tuple[dict[str, Tensor] | None, str, Path | None]:
    """State dict (None for random weights), hash and path of what `weights` names."""
    if weights == "random":
        return None, "", None
    if weights == "official":
        path = locate(name) or fetch(name)
        sha256 = model_spec(name).sha256
        return load_state(path, sha256), str(sha256), path
    path = Path(weights).expanduser()
    state = load_state(path)
    return state, sha256_of(path), path


def _from_upstream(construct: Callable[[], Sam]) -> Parts:
    sam = construct()
    return sam.image_encoder, sam.prompt_encoder, sam.mask_decoder


def _prompt_and_decoder(
    image_size: int, patch: int, dim: int, mlp_dim: int, heads: int, iou_hidden: int
) -> tuple[PromptEncoder, MaskDecoder]:
    """SAM's prompt encoder and mask decoder at width `dim` (segment_anything.build_sam has 256, 2048, 8, 256)."""
    grid = image_size // patch
    prompt_encoder = PromptEncoder(dim, (grid, grid), (image_size, image_size), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=heads, mlp_dim=mlp_dim)
    decoder = MaskDecoder(
        transformer_dim=dim, transformer=transformer, num_multimask_outputs=3, iou_head_hidden_dim=iou_hidden
    )
    return prompt_encoder, decoder


def _vit_t() -> Parts:
    return TinyViT(), *_prompt_and_decoder(1024, PATCH, 256, 2048, 8, 256)


def _vit_nano() -> Parts:
    sizes = nano.IMAGE_SIZE, nano.PATCH, nano.PROMPT_DIM, nano.DECODER_MLP, nano.DECODER_HEADS, nano.IOU_HIDDEN
    return nano_encoder(), *_prompt_and_decoder(*sizes)


ARCHITECTURES: Final[Mapping[str, Callable[[], Parts]]] = {
    "vit_b": lambda: _from_upstream(build_sam_vit_b),
    "vit_l": lambda: _from_upstream(build_sam_vit_l),
    "vit_h": lambda: _from_upstream(build_sam_vit_h),
    "vit_t": _vit_t,
    "vit_nano": _vit_nano,
}
"""Constructors of the parts at the native image size, with weights as torch draws them."""
