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

from medsam_lora.models.embedding_cache import EmbeddingCache
from medsam_lora.models.input_spec import InputSpec
from medsam_lora.models.precision import resolve_amp
from medsam_lora.models.sam import SamModel
from medsam_lora.peft.contract import Adaptation
from medsam_lora.prompts.box import to_model
from medsam_lora.transforms.resizing import model_scale, to_model_frame, to_native_frame

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

    def use_cache(self, folder: Path, max_bytes: int, amp: str) -> bool:
        """Keep image embeddings in `folder` from now on, where the method leaves the image encoder as it is.

        Parameters
        ----------
        folder : Path
        max_bytes : int
        amp : str
            Setting of the autocast that the forward passes run under: embeddings differ by it.

        Returns
        -------
        bool
            False where the method changes the encoder; then nothing is cached.
        """
        if self.adaptation.report.cache_point != "embedding" or max_bytes <= 0:
            return False
        identity = {
            "base_sha256": self.sam.base_sha256,
            "model": self.sam.name,
            "image_size": self.sam.image_size,
            "input_spec": self.input_spec.to_json(),
            "amp": resolve_amp(amp, self.device),
            "device": self.device.type,
        }
        self.cache = EmbeddingCache(folder, identity, max_bytes)
        return True

    def _embeddings(self, z: Tensor, present: Sequence[int]) -> Tensor:
        """`encode`, through the cache where there is one."""
        if self.cache is None:
            return self.encode(z)
        keys = self.cache.keys(z.cpu(), present)
        found = [self.cache.read(key) for key in keys]
        missing = [b for b, embedding in enumerate(found) if embedding is None]
        if missing:
            with torch.no_grad():
                computed = self.encode(z[missing]).unflatten(0, (len(missing), z.shape[1]))
            for b, embedding in zip(missing, computed, strict=True):
                self.cache.write(keys[b], embedding)
                found[b] = embedding
        return torch.cat([embedding.to(z.device) for embedding in found if embedding is not None])

    def encode(self, z: Tensor) -> Tensor:
        """Image embeddings of z-scored slices.

        Parameters
        ----------
        z : Tensor of float32, shape (B, M, X, Y) or (B, depth, M, X, Y)
            Background exactly 0. Stacks of neighbouring slices where the method looks at several (`Report.depth`).

        Returns
        -------
        Tensor, shape (B * M, D, s, s)
            Slice-major: image ``b * M + m`` is modality m of slice b, the middle one of a stack.
        """
        depth = self.adaptation.report.depth
        if depth > 1:
            # Each stack one after the other: slices of one case and modality.
            stacks = z.transpose(1, 2).flatten(0, 1)
            pixels = to_model_frame(self.input_spec.to_pixels(stacks), self.sam.image_size)
            return self.sam.encode(pixels).unflatten(0, (len(stacks), depth))[:, depth // 2]
        return self.sam.encode(to_model_frame(self.input_spec.to_pixels(z), self.sam.image_size))

    def forward(
        self,
        z: Tensor,
        boxes: Sequence[np.ndarray],
        present: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
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
        by_area = self.regions_by_area and tokens is None
        tokens = list(self.main_tokens if tokens is None else tokens)
        scale, _ = model_scale((shape[0], shape[1]), self.sam.image_size)
        boxes_model = np.concatenate([to_model(np.asarray(b), scale) for b in boxes for _ in range(n_channels)])
        counts = [len(b) for b in boxes for _ in range(n_channels)]
        logits, iou = self.sam.decode(
            self._embeddings(z, range(n_channels) if present is None else present),
            torch.as_tensor(boxes_model, dtype=torch.float32, device=z.device),
            counts,
        )
        logits = _over_boxes(logits[:, tokens], counts, "max").unflatten(0, (n_slices, n_channels))
        iou = _over_boxes(iou[:, tokens], counts, "mean").unflatten(0, (n_slices, n_channels)).mean(dim=1)
        fused = to_native_frame(self.fusion(logits, present), self.sam.image_size, (shape[0], shape[1]))
        if by_area:
            order = (fused > 0).sum(dim=(-2, -1)).argsort(dim=1, descending=True, stable=True)
            fused = torch.take_along_dim(fused, order[:, :, None, None], dim=1)
            iou = torch.take_along_dim(iou, order, dim=1)
        return SegmenterOutput(fused, iou)

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
