"""Slices of the prepared store as training samples, each a pure function of (seed, epoch, index).

No global random state and no worker order enters a sample, so that a resumed run sees what the uninterrupted one
would have seen. Voxels stay memory-mapped and raw: they travel to the device as int16, and are z-scored there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medsam_lora.errors import TrainingError
from medsam_lora.inference.predictor import stack_of
from medsam_lora.labels import region_mask
from medsam_lora.prompts.box import boxes_from_mask, jitter
from medsam_lora.records import PreparedSlices
from medsam_lora.transforms.augment import random_flip
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.resizing import model_scale


@dataclass(frozen=True)
class PromptOptions:
    """How boxes are made from the reference.

    Parameters
    ----------
    kind : str
        ``union`` or ``per_component``.
    min_voxels : int
    jitter_px : float
        In model pixels; training only.
    """

    kind: str = "union"
    min_voxels: int = 1
    jitter_px: float = 0.0


@dataclass(frozen=True)
class Sample:
    """A slice ready to be collated.

    Parameters
    ----------
    raw : ndarray of int16 or float32, shape (M, X, Y), or (depth, M, X, Y)
        Voxels as in the file.
    mean, std : ndarray of float, shape (M,) or (depth, M)
    voxels : str
        A key of `transforms.NORMALISATIONS`.
    masks : ndarray of bool, shape (R, X, Y)
    boxes : ndarray of float32, shape (n, 4)
        (i0, j0, i1, j1) on voxel edges of the crop grid.
    """

    raw: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    voxels: str
    masks: np.ndarray
    boxes: np.ndarray

    @property
    def z(self) -> np.ndarray:
        """The slice z-scored, float32, of the shape of `raw`."""
        return zscore(self.raw, self.mean, self.std, self.voxels)


@dataclass(frozen=True)
class Batch:
    """Samples of one size.

    Parameters
    ----------
    raw : Tensor of int16 or float32, shape (B, M, X, Y), or (B, depth, M, X, Y)
    mean, std : Tensor of float32, shape (B, M), or (B, depth, M)
    voxels : str
    masks : Tensor of bool, shape (B, R, X, Y)
    boxes : list of B ndarrays of float32, shape (n, 4)
    """

    raw: Tensor
    mean: Tensor
    std: Tensor
    voxels: str
    masks: Tensor
    boxes: list[np.ndarray]

    @property
    def z(self) -> Tensor:
        """The slices z-scored where they are, float32, of the shape of `raw`."""
        return zscore(self.raw, self.mean, self.std, self.voxels)

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory without waiting for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        raw, mean, std, masks = (move(tensor) for tensor in (self.raw, self.mean, self.std, self.masks))
        return dataclasses.replace(self, raw=raw, mean=mean, std=std, masks=masks)


class SliceDataset:
    """The slices of some prepared cases.

    Parameters
    ----------
    cases : sequence of PreparedSlices
    regions : sequence of str
        Channels of the masks.
    prompts : PromptOptions
    image_size : int
        Side of the model frame, in which jitter is counted.
    depth : int
        Slices of a sample: 1, or the odd depth of a method that looks at neighbours (`peft.contract.Report`).

    Raises
    ------
    TrainingError
        Where a case has no reference, or no slice has a box.
    """

    def __init__(
        self,
        cases: Sequence[PreparedSlices],
        regions: Sequence[str],
        prompts: PromptOptions,
        image_size: int,
        depth: int = 1,
    ) -> None:
        self.cases = list(cases)
        self.regions = tuple(regions)
        self.prompts = prompts
        self.image_size = image_size
        self.depth = depth
        self.index: list[tuple[int, int]] = []
        # Where the boxes of a slice come from: itself, or for a tumour-free slice the nearest slice with tumour of
        # its case, as a 3-D box drawn around a lesion would also pass over slices beyond its ends.
        self.box_slice: list[int] = []
        for c, case in enumerate(self.cases):
            self._index_case(c, case)
        if not self.index:
            raise TrainingError(
                "no slice shows the region, so there is nothing to prompt with",
                remedy="Check the references, data split and slicing settings.",
            )

    def _index_case(self, c: int, case: PreparedSlices) -> None:
        if case.label is None:
            raise TrainingError(
                "the case has no reference", case_id=case.case_id, remedy="Train on cases with a reference only."
            )
        prompting = [n for n in range(len(case.ks)) if len(self._boxes(case.label[n]))]
        for n in range(len(case.ks)) if prompting else ():
            self.index.append((c, n))
            self.box_slice.append(min(prompting, key=lambda m, n=n: abs(case.ks[m] - case.ks[n])))  # type: ignore[misc]

    def _boxes(self, label: np.ndarray) -> np.ndarray:
        # The box is always the whole tumour's, whichever regions are asked for.
        return boxes_from_mask(region_mask(np.asarray(label), "WT"), self.prompts.kind, self.prompts.min_voxels)

    def __len__(self) -> int:
        return len(self.index)

    def shape(self, item: int) -> tuple[int, int]:
        """In-plane shape of a slice."""
        x, y, _ = self.cases[self.index[item % len(self)][0]].crop.shape
        return x, y

    def sample(self, item: int, generator: np.random.Generator | None = None, flip: bool = False) -> Sample:
        """A slice; with a generator its boxes are jittered and, if asked for, it is mirrored at random.

        Items from ``len(self)`` on are the slices once more, for another draw (`epoch_order`).
        """
        c, n = self.index[item % len(self)]
        case = self.cases[c]
        assert case.label is not None
        raw, mean, std = stack_of(case, n, self.depth)
        label = np.asarray(case.label[n])
        masks = np.stack([region_mask(label, region) for region in self.regions])
        boxes = self._boxes(case.label[self.box_slice[item % len(self)]])
        if generator is not None:
            shape = self.shape(item)
            if self.prompts.jitter_px > 0:
                scale, _ = model_scale(shape, self.image_size)
                boxes = jitter(boxes, self.prompts.jitter_px, scale, shape, generator)
            if flip:
                raw, masks, boxes = random_flip(raw, masks, boxes, generator)
        return Sample(raw, mean, std, case.voxels, masks, boxes)

    def batch(self, items: Sequence[int], seeds: Sequence[int] | None = None, flip: bool = False) -> Batch:
        """Collate items of one size; `seeds` (such as seed and epoch) make each sample's generator."""
        samples = [self.sample(i, None if seeds is None else np.random.default_rng([*seeds, i]), flip) for i in items]
        return Batch(
            torch.from_numpy(np.stack([s.raw for s in samples])),
            torch.tensor(np.stack([s.mean for s in samples]), dtype=torch.float32),
            torch.tensor(np.stack([s.std for s in samples]), dtype=torch.float32),
            samples[0].voxels,
            torch.from_numpy(np.stack([s.masks for s in samples])),
            [s.boxes for s in samples],
        )


def plan_batches(items: Sequence[int], shapes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Cut items into batches of one shape each, keeping their order as far as that allows.

    Examples
    --------
    >>> plan_batches([5, 6, 7, 8], [(2, 2), (2, 2), (3, 2), (2, 2)], 2)
    [[5, 6], [7], [8]]
    """
    batches: list[list[int]] = []
    filling: dict[tuple[int, int], list[int]] = {}
    for item, shape in zip(items, shapes, strict=True):
        open_batch = filling.get(shape)
        if open_batch is None or len(open_batch) == batch_size:
            open_batch = []
            filling[shape] = open_batch
            batches.append(open_batch)
        open_batch.append(item)
    return batches


def epoch_order(n_items: int, seed: int, epoch: int, limit: int | None = None) -> list[int]:
    """The order of one epoch: a permutation drawn from (seed, epoch), cut to `limit` items.

    Where `limit` is above `n_items`, more permutations follow; their items count on from `n_items`, so that a slice
    that comes again is jittered and mirrored anew.

    Examples
    --------
    >>> epoch_order(5, seed=0, epoch=1) == epoch_order(5, seed=0, epoch=1), len(epoch_order(5, 0, 1, limit=3))
    (True, 3)
    >>> sorted(epoch_order(2, seed=0, epoch=1, limit=6))
    [0, 1, 2, 3, 4, 5]
    """
    generator = np.random.default_rng([seed, epoch])
    passes = 1 if limit is None else -(-limit // n_items)
    order = np.concatenate([generator.permutation(n_items) + n * n_items for n in range(max(passes, 1))])
    return order[:limit].tolist()
