"""The whole function from z-scored slices and boxes to masks: input range, SAM, adaptation, fusion, and back.

Frames: images, boxes, logits and masks of this module's interface stand on the *crop* grid (native resolution);
the model frame exists only inside `Segmenter.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medsam_lora.errors import AdapterError
from medsam_lora.models import cache_points
from medsam_lora.models.embedding_cache import EmbeddingCache, Found
from medsam_lora.models.input_spec import InputSpec
from medsam_lora.models.precision import float32_products, resolve_amp
from medsam_lora.models.sam import SamModel
from medsam_lora.peft.contract import Adaptation, attached_to
from medsam_lora.prompts.box import to_model
from medsam_lora.transforms.resizing import Plane, covered_frame, model_scale, to_model_frame, to_native_frame

SINGLE_MASK_TOKEN = 0
"""SAM's mask token for one unambiguous prompt such as a box; tokens 1-3 are the multimask outputs."""

REGION_TOKENS = {"WT": 3, "TC": 2, "ET": 1}
"""The mask token of each region where several are predicted. SAM learned whole, part and sub-part for one prompt; which
token begins nearest to which region was measured (docs/decisions/0002-regions.md)."""

N_TOKENS = 4

_FUSION_PREFIX = "fusion."


@dataclass(frozen=True)
class SegmenterOutput:
    """Fused output of a batch.

    Parameters
    ----------
    logits : Tensor of float, shape (B, T, X, Y)
        On the crop grid, one channel per mask token asked for.
    iou : Tensor of float, shape (B, T)
        The decoder's IoU estimate, its mean over modalities and boxes.
    """

    logits: Tensor
    iou: Tensor


class Segmenter(nn.Module):
    """SAM with an adaptation, predicting the modalities of a slice in one batch and fusing them into one mask.

    Parameters
    ----------
    sam : SamModel
    adaptation : Adaptation
        Attached to `sam` already.
    fusion : Module
        From `models.fusion.build_fusion`.
    input_spec : InputSpec
    modalities : sequence of str
        Channel order of the images.
    regions : sequence of str
        ``["WT"]``, or all three: SAM's multimask outputs then are the regions. A method that trains nothing has no
        notion of regions; its three masks are given to them by descending area, slice by slice (`regions_by_area`).
    """

    def __init__(
        self,
        sam: SamModel,
        adaptation: Adaptation,
        fusion: nn.Module,
        input_spec: InputSpec,
        modalities: Sequence[str],
        regions: Sequence[str] = ("WT",),
    ) -> None:
        super().__init__()
        self.sam = sam
        self.adaptation = adaptation
        self.fusion = fusion
        self.input_spec = input_spec
        self.modalities = tuple(modalities)
        self.regions = tuple(regions)
        self.regions_by_area = len(self.regions) > 1 and adaptation.report.count == 0
        self.cache: EmbeddingCache | None = None
        self.cache_point = ""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.sam.parameters()).device

    @property
    def main_tokens(self) -> list[int]:
        """The mask tokens that make the prediction, one per region."""
        return [SINGLE_MASK_TOKEN] if len(self.regions) == 1 else [REGION_TOKENS[r] for r in self.regions]

    @property
    def token_regions(self) -> list[int]:
        """For every mask token the index of the region it is trained on; those of no region of their own learn WT."""
        own = {token: index for index, token in enumerate(self.main_tokens)}
        return [own.get(token, 0) for token in range(N_TOKENS)]

    def use_cache(self, folder: Path, max_bytes: int, amp: str, *, fixed: str = "", writers: int = 1) -> bool:
        """Keep what the image encoder computes before anything trained in `folder` from now on.

        Parameters
        ----------
        folder : Path
        max_bytes : int
            Of all entries in the folder.
        amp : str
            Setting of the autocast that the forward passes run under: embeddings differ by it.
        fixed : str
            Digest of the adapter, where its weights will not change from now on: image embeddings are kept then,
            whatever the method, under that digest, so that a second prompt finds them.
        writers : int
            Processes that share the room.

        Returns
        -------
        bool
            False where there is no room, or the method changes the encoder from its beginning or looks at stacks of
            slices; then nothing is cached.
        """
        point = self.adaptation.report.cache_point
        # Slices of a stack would be kept once for every stack they are in.
        if max_bytes <= 0 or not (point or fixed) or self.adaptation.report.depth > 1:
            return False
        # A frozen encoder's embeddings are the same under every adapter.
        own = {"adapter": fixed} if fixed and point != "embedding" else {}
        self.cache_point = "embedding" if own else str(point)
        identity = {
            "base_sha256": self.sam.base_sha256,
            "model": self.sam.name,
            "image_size": self.sam.image_size,
            "grid": self.sam.grid,
            "input_spec": self.input_spec.to_json(),
            "amp": resolve_amp(amp, self.device),
            "device": self.device.type,
            "cache_point": self.cache_point,
            **own,
        }
        self.cache = EmbeddingCache(folder, identity, max_bytes, writers)
        return True

    def read_ahead(self, z: Tensor) -> Found | None:
        """What the cache has of slices of all modalities: for a thread that prepares the next batch.

        Parameters
        ----------
        z : Tensor of float32, shape (B, M, X, Y)
            On the CPU.

        Returns
        -------
        Found or None
            For `embed`; in page-locked memory where the segmenter is on a GPU. None without a cache.
        """
        if self.cache is None:
            return None
        found = self.cache.look_up(z, range(z.shape[1]))
        return found.pinned() if self.device.type == "cuda" else found

    def embed(self, z: Tensor, present: Sequence[int] | None = None, ahead: Found | None = None) -> Tensor:
        """`encode`, through the cache where there is one.

        Parameters
        ----------
        z : Tensor of float32, shape (B, M, X, Y)
        present : sequence of M int, optional
            Which of the segmenter's modalities the channels of `z` are; all of them by default.
        ahead : Found, optional
            What `read_ahead` found of these slices.

        Returns
        -------
        Tensor, shape (B * M, D, s, s)
        """
        if self.cache is None:
            return self.encode(z)
        self._check_in_use()
        if ahead is None:
            ahead = self.cache.look_up(z.cpu(), range(z.shape[1]) if present is None else present)
            keys, found = ahead.keys, list(ahead.entries)
        else:
            # What was not there then can have been computed for the batch before.
            keys = ahead.keys
            found = [self.cache.read(k) if e is None else e for k, e in zip(keys, ahead.entries, strict=True)]
        missing = [b for b, entry in enumerate(found) if entry is None]
        if missing:
            with torch.no_grad():
                # In the layout they are read back in: the decoder's rounding depends on it, in bfloat16 visibly.
                computed = self._until(z[missing]).contiguous().unflatten(0, (len(missing), z.shape[1]))
            for b, entry in zip(missing, computed, strict=True):
                self.cache.write(keys[b], entry)
                found[b] = entry
        entries = torch.cat([entry.to(z.device, non_blocking=True) for entry in found if entry is not None])
        return cache_points.onward(self.sam.image_encoder, entries, self.cache_point)

    def _until(self, z: Tensor) -> Tensor:
        """What is cached of slices: their embeddings, or activations in the encoder."""
        if self.cache_point == "embedding":
            return self.sam.encode(self._pixels(z))
        return cache_points.until(self.sam.image_encoder, self._pixels(z), self.cache_point)

    def _pixels(self, z: Tensor) -> Tensor:
        frame = self.frame((z.shape[-2], z.shape[-1]))
        return to_model_frame(self.input_spec.to_pixels(z), self.sam.image_size, frame)

    def encode(self, z: Tensor) -> Tensor:
        """Image embeddings of z-scored slices.

        Parameters
        ----------
        z : Tensor of float32, shape (B, M, X, Y) or (B, depth, M, X, Y)
            Background exactly 0. Stacks of neighbouring slices where the method looks at several (`Report.depth`).

        Returns
        -------
        Tensor, shape (B * M, D, h, w)
            Slice-major: image ``b * M + m`` is modality m of slice b, the middle one of a stack. Of the whole model
            frame, or on the unpadded grid of the part the slices reach.
        """
        self._check_in_use()
        depth = self.adaptation.report.depth
        if depth == 1:
            return self._encoded(self._pixels(z))
        # Each stack one after the other: slices of one case and modality.
        stacks = z.transpose(1, 2).flatten(0, 1)
        return self._encoded(self._pixels(stacks)).unflatten(0, (len(stacks), depth))[:, depth // 2]

    def _encoded(self, pixels: Tensor) -> Tensor:
        point = self.adaptation.report.cache_point
        if point is None:
            return self.sam.encode(pixels)
        # What no training changes runs without autograd, cached or not.
        if point == "embedding":
            with torch.no_grad():
                return self.sam.encode(pixels)
        encoder = self.sam.image_encoder
        return cache_points.onward(encoder, cache_points.until(encoder, pixels, point), point)

    def frame(self, shape: Plane) -> Plane:
        """The part of the model frame that slices of this shape are encoded on, in model pixels."""
        size = self.sam.image_size
        return covered_frame(shape, size) if self.sam.grid == "unpadded" else (size, size)

    def forward(
        self,
        z: Tensor,
        boxes: Sequence[np.ndarray],
        present: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
        ahead: Found | None = None,
    ) -> SegmenterOutput:
        """Fused logits of a batch of slices.

        Parameters
        ----------
        z : Tensor of float32, shape (B, M, X, Y) or (B, depth, M, X, Y)
            Z-scored slices on the crop grid, background exactly 0; stacks of them as of `encode`.
        boxes : sequence of B ndarrays of float, shape (n_b, 4)
            (i0, j0, i1, j1) on voxel edges of the crop grid, at least one per slice.
        present : sequence of M int, optional
            Which of the segmenter's modalities the channels of `z` are; all of them by default.
        tokens : sequence of int, optional
            Mask tokens wanted; the main ones by default.
        ahead : Found, optional
            As `embed` takes it.

        Returns
        -------
        SegmenterOutput

        Raises
        ------
        ValueError
            Where a slice has no box, the channels are not as many as the modalities present, or stacks not as deep as
            the method asks.
        """
        depth = self.adaptation.report.depth
        if z.ndim != (5 if depth > 1 else 4) or (depth > 1 and z.shape[1] != depth):
            raise ValueError(f"slices of shape {tuple(z.shape)}: the method looks at stacks of {depth}")
        n_slices, (n_channels, *shape) = len(z), z.shape[-3:]
        n_expected = len(self.modalities) if present is None else len(present)
        if n_channels != n_expected or len(boxes) != n_slices or any(len(b) == 0 for b in boxes):
            raise ValueError(
                f"{n_slices} slices of {n_channels} channels need {n_expected} channels and one or more boxes each"
            )
        return self.decode(self.embed(z, present, ahead), boxes, (shape[0], shape[1]), present, tokens)

    def decode(
        self,
        embedding: Tensor,
        boxes: Sequence[np.ndarray],
        shape: tuple[int, int],
        present: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> SegmenterOutput:
        """Fused logits from embeddings that are there: `forward` without the image encoder.

        Parameters
        ----------
        embedding : Tensor of float, shape (B * M, D, s, s)
            From `embed`, in evaluation mode as good for a second prompt as for the first.
        boxes : sequence of B ndarrays of float, shape (n_b, 4)
            As `forward` takes them.
        shape : tuple of int, (X, Y)
            Of the slices, on the crop grid.
        present, tokens
            As `forward` takes them.
        """
        self._check_in_use()
        n_slices, n_channels = len(boxes), len(embedding) // len(boxes)
        by_area = self.regions_by_area and tokens is None
        tokens = list(self.main_tokens if tokens is None else tokens)
        scale, _ = model_scale(shape, self.sam.image_size)
        boxes_model = np.concatenate([to_model(np.asarray(b), scale) for b in boxes for _ in range(n_channels)])
        counts = [len(b) for b in boxes for _ in range(n_channels)]
        logits, iou = self.sam.decode(
            embedding, torch.as_tensor(boxes_model, dtype=torch.float32, device=embedding.device), counts
        )
        logits = _over_boxes(logits[:, tokens], counts, "max").unflatten(0, (n_slices, n_channels))
        iou = _over_boxes(iou[:, tokens], counts, "mean").unflatten(0, (n_slices, n_channels)).mean(dim=1)
        with float32_products(logits.device, "none"):
            fused = to_native_frame(self.fusion(logits, present), self.sam.image_size, shape, self.frame(shape))
        if by_area:
            order = (fused > 0).sum(dim=(-2, -1)).argsort(dim=1, descending=True, stable=True)
            fused = torch.take_along_dim(fused, order[:, :, None, None], dim=1)
            iou = torch.take_along_dim(iou, order, dim=1)
        return SegmenterOutput(fused, iou)

    def _check_in_use(self) -> None:
        # On a shared base model another adapter may have been swapped in since: its masks would pass for this one's.
        if attached_to(self.sam) is not self.adaptation:
            raise AdapterError(
                f"the adapter of this segmenter (method {self.adaptation.name}) is not in use: another one was swapped "
                "in, or none",
                remedy="Use the segmenter that swap() gave last.",
            )

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """The declared trainable parameters by group (``encoder``, ``decoder``, ``fusion``)."""
        groups = {name: list(parameters) for name, parameters in self.adaptation.parameters_by_group().items()}
        fusion = [p for p in self.fusion.parameters() if p.requires_grad]
        if fusion:
            groups["fusion"] = fusion
        return groups

    def adapter_state(self) -> dict[str, Tensor]:
        """Every tensor of the adaptation and of the fusion, by name: what an adapter file holds."""
        own = {_FUSION_PREFIX + name: tensor.detach() for name, tensor in self.fusion.state_dict().items()}
        return {**self.adaptation.state(), **own}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Copy an adapter's tensors in, in place and strictly (both halves refuse missing and unexpected names)."""
        own = {k.removeprefix(_FUSION_PREFIX): v for k, v in state.items() if k.startswith(_FUSION_PREFIX)}
        # The adaptation first: it changes nothing where it refuses.
        self.adaptation.load({k: v for k, v in state.items() if not k.startswith(_FUSION_PREFIX)})
        self.fusion.load_state_dict(own)


def _over_boxes(values: Tensor, counts: Sequence[int], how: str) -> Tensor:
    """Reduce the prompts of each image to one: shape (sum of counts, ...) to (len(counts), ...).

    The union of the masks of several boxes is the largest logit at each pixel.
    """
    if all(n == 1 for n in counts):
        return values
    groups = torch.split(values, list(counts))
    if how == "max":
        return torch.stack([g.amax(dim=0) for g in groups])
    return torch.stack([g.mean(dim=0) for g in groups])
