"""Pre-training a small SAM on synthetic promptable scenes that are not tumours.

One image of a batch has several objects: the encoder, which costs most, runs once for all of their prompts, as in
SAM's own training. Sample i of step s is a function of (seed, s, i), so a run that was stopped goes on as it would
have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from medsam_lora.datasets.scenes import make_scene, shapes_scene
from medsam_lora.datasets.shapes import box_of
from medsam_lora.models.precision import autocast
from medsam_lora.models.sam import SamModel
from medsam_lora.sam_modules import ImageEncoderViT
from medsam_lora.training.losses import dice_loss, hard_iou

POINTS_EVERY, NOTHING_EVERY = 3, 6
"""Steps between those that also ask by points, and by nothing at all."""

MOST_POINTS = 3
WARM_UP = 50

Points = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Course:
    """A part of the training: step by step the sizes take turns.

    Parameters
    ----------
    steps : int
    sizes : sequence of int
        Sides of the pictures.
    pictures : sequence of int
        Per step, for each size.
    shapes : float
        Share of pictures that are of `datasets.shapes` instead of scenes.
    restart : float
        Where above 0, the learning rate warms up to this share of its peak and falls anew from here.
    """

    steps: int
    sizes: Sequence[int]
    pictures: Sequence[int]
    shapes: float = 0.0
    restart: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How long, on what sizes and at what rate.

    Parameters
    ----------
    courses : sequence of Course
        One after the other. Small pictures first: where to look is learned in a tenth of the time on a few tokens.
    lr, weight_decay : float
        Peak rate of AdamW (linear warm-up over 50 steps, then a half cosine to zero, once for all courses or anew
        where one restarts it), and its decay.
    seed : int
    """

    courses: Sequence[Course]
    lr: float
    weight_decay: float
    seed: int

    @property
    def steps(self) -> int:
        """Steps of all courses."""
        return sum(course.steps for course in self.courses)

    def pictures(self, step: int) -> tuple[int, int]:
        """Side and number of the pictures of a step (from 1).

        Examples
        --------
        >>> recipe = Recipe([Course(2, [64], [16]), Course(4, [128, 256], [16, 4])], 1e-3, 0.05, 0)
        >>> [recipe.pictures(step) for step in range(1, 7)]
        [(64, 16), (64, 16), (128, 16), (256, 4), (128, 16), (256, 4)]
        """
        course, left = self._course(step)
        turn = left % len(course.sizes)
        return course.sizes[turn], course.pictures[turn]

    def shapes(self, step: int) -> float:
        """Share of a step's pictures that are of `datasets.shapes`."""
        return self._course(step)[0].shapes

    def rate(self, step: int) -> float:
        """Learning rate of a step.

        Examples
        --------
        >>> recipe = Recipe([Course(100, [64], [8]), Course(200, [64], [8], restart=0.6)], 1.0, 0.0, 0)
        >>> [round(recipe.rate(step), 3) for step in (25, 51, 100, 125, 201, 300)]
        [0.5, 0.5, 0.0, 0.3, 0.3, 0.0]
        """
        first, last, peak = 0, 0, self.lr
        for course in self.courses:
            if course.restart:
                if step <= last:
                    break
                first, peak = last, self.lr * course.restart
            last += course.steps
        done, whole = step - first, last - first
        return peak * min(done / WARM_UP, 0.5 * (1 + math.cos(math.pi * (done - 1) / whole)))

    def _course(self, step: int) -> tuple[Course, int]:
        """The course of a step, and how many steps of it were before."""
        left = step - 1
        for course in self.courses:
            if left < course.steps:
                return course, left
            left -= course.steps
        raise ValueError(f"step {step} is behind the last, {self.steps}")


@dataclass(frozen=True)
class SceneBatch:
    """A batch in the model frame.

    Parameters
    ----------
    pixels : Tensor of float32, shape (B, 3, S, S)
        Normalised as SAM's images are.
    counts : list of B int
        Objects of each image.
    boxes : Tensor of float32, shape (N, 4)
        XYXY, more or less exact.
    points : tuple of Tensor, shapes (N, P, 2) and (N, P)
        XY of pixel corners and labels (1: inside) of points in each object.
    masks : Tensor of float32, shape (N, 1, S, S)
    painted : Tensor of float32, shape (B, 1, S, S)
    """

    pixels: Tensor
    counts: list[int]
    boxes: Tensor
    points: Points
    masks: Tensor
    painted: Tensor


def train_step(
    sam: SamModel, optimiser: torch.optim.Optimizer, recipe: Recipe, step: int, amp: str = "none"
) -> tuple[float, float]:
    """One update of all of a SAM.

    Parameters
    ----------
    sam : SamModel
    optimiser : Optimizer
    recipe : Recipe
    step : int
        From 1.
    amp : str
        Autocast of the forward pass: ``none``, ``bf16`` or ``auto``.

    Returns
    -------
    loss, iou : float
        `iou` is the mean over the boxes' masks.
    """
    device = sam.pixel_mean.device
    size, n_images = recipe.pictures(step)
    rank, world = _place()
    batch = scene_batch(recipe.seed, step, range(rank, n_images, world), size, recipe.shapes(step))
    masks, painted = (F.avg_pool2d(part.to(device), sam.patch // 4) for part in (batch.masks, batch.painted))
    near = _near(masks)
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate(step)
    with at_size(sam, size), autocast(device, amp):
        embedding = encode(sam, batch.pixels.to(device))
        logits, iou = sam.decode(embedding, batch.boxes.to(device), batch.counts)
        loss, iou_of_boxes = _loss(logits, iou, masks, near, ambiguous=False)
        if step % POINTS_EVERY == 0:
            places, labels = (part.to(device) for part in batch.points)
            logits, iou = sam.decode(embedding, None, batch.counts, points=(places, labels))
            loss = loss + 0.5 * _loss(logits, iou, masks, near, ambiguous=True)[0]
        if step % NOTHING_EVERY == 0:
            logits, iou = sam.decode(embedding, None)
            loss = loss + 0.5 * _loss(logits, iou, painted, torch.ones_like(painted), ambiguous=False)[0]
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    _average_gradients(sam, world)
    torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
    optimiser.step()
    return loss.item(), iou_of_boxes


def _loss(logits: Tensor, iou: Tensor, target: Tensor, weight: Tensor, ambiguous: bool) -> tuple[Tensor, float]:
    """Token 0 learns every mask; of the three others the best one does (SAM, section 3), the rest a little.

    Dice and cross-entropy on the decoder grid against the share of each cell that is covered, and the error of the
    decoder's own estimate of IoU. `weight`, shape (N, 1, s, s), is that of cross-entropy.
    """
    logits = logits.float()
    every = target.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, every, reduction="none")
    terms = dice_loss(logits, every) + (entropy * weight).sum(dim=(-2, -1)) / weight.sum(dim=(-2, -1))
    best = terms[:, 1:].min(dim=1).values.mean()
    found = hard_iou(logits.detach(), every)
    error = F.mse_loss(iou.float(), found)
    # A box says which object is meant; a point may mean the whole or a part.
    loss = terms[:, 0].mean() + (0.5 if ambiguous else 0.1) * best + 0.02 * terms[:, 1:].mean() + 0.1 * error
    return loss, float(found[:, 0].mean())


def _near(target: Tensor) -> Tensor:
    """Weight of each cell for cross-entropy: full in and round the object's box, a tenth elsewhere.

    Evenly weighted, a small object is nearly all background, and the model learns to predict nothing.
    """
    size = target.shape[-1]
    cells = torch.arange(size, device=target.device)
    weights = []
    for axis in (-1, -2):
        there = (target > 0).any(dim=axis).squeeze(1)
        low = torch.where(there, cells, size).amin(dim=1, keepdim=True)
        high = torch.where(there, cells, -1).amax(dim=1, keepdim=True)
        margin = 1 + (high - low) // 4
        weights.append((cells >= low - margin) & (cells <= high + margin))
    near = weights[0][:, None, :, None] & weights[1][:, None, None, :]
    return near.to(target.dtype) * 0.9 + 0.1


@contextmanager
def at_size(sam: SamModel, size: int) -> Iterator[None]:
    """Let the prompt encoder take prompts in pictures of another size; what was is put back."""
    prompts, patch = sam.prompt_encoder, sam.patch
    kept = prompts.input_image_size, prompts.image_embedding_size
    prompts.input_image_size, prompts.image_embedding_size = (size, size), (size // patch, size // patch)
    try:
        yield
    finally:
        prompts.input_image_size, prompts.image_embedding_size = kept


def encode(sam: SamModel, pixels: Tensor) -> Tensor:
    """Embeddings of pictures of any size, differentiable; positions are as `models.sam.fit_positions` gives them.

    Parameters
    ----------
    sam : SamModel
        With a ViT.
    pixels : Tensor of float, shape (B, 3, S, S)

    Returns
    -------
    Tensor, shape (B, D, S/P, S/P)
    """
    encoder = sam.image_encoder
    assert isinstance(encoder, ImageEncoderViT)
    if pixels.shape[-1] == sam.image_size:
        return encoder(pixels)
    cells = encoder.patch_embed(pixels)
    table = F.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), cells.shape[1:3], mode="bicubic", align_corners=False)
    cells = cells + table.permute(0, 2, 3, 1)
    for block in encoder.blocks:
        # Relative positions are interpolated by upstream's `get_rel_pos`.
        cells = block(cells)
    return encoder.neck(cells.permute(0, 3, 1, 2))


def _place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)


def _average_gradients(sam: SamModel, world: int) -> None:
    if world == 1:
        return
    given = [p.grad for p in sam.parameters() if p.requires_grad]
    # A token that no prompt of this process used has no gradient; all processes must send the same.
    sizes = [p.numel() for p in sam.parameters() if p.requires_grad]
    flat = torch.cat([torch.zeros(n) if g is None else g.flatten() for n, g in zip(sizes, given, strict=True)])
    torch.distributed.all_reduce(flat)
    parameters = [p for p in sam.parameters() if p.requires_grad]
    for parameter, part in zip(parameters, (flat / world).split(sizes), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def scene_batch(seed: int, step: int, numbers: Sequence[int], size: int, shapes: float = 0.0) -> SceneBatch:
    """The scenes of those numbers of one batch; each is a function of (seed, step, number).

    Parameters
    ----------
    seed, step : int
    numbers : sequence of int
        Of the batch's pictures, the ones to draw.
    size : int
        Side of the pictures.
    shapes : float
        Share of pictures that are of `datasets.shapes`.
    """
    images, counts, boxes, points, masks, painted = [], [], [], [], [], []
    n_points = 1 + int(np.random.default_rng([seed, step]).integers(MOST_POINTS))
    for i in numbers:
        generator = np.random.default_rng([seed, step, i])
        scene = shapes_scene(generator, size) if shapes and generator.random() < shapes else make_scene(generator, size)
        images.append(scene.image)
        counts.append(len(scene.masks))
        masks.append(scene.masks)
        painted.append(scene.painted[None])
        boxes += [shaken_box(generator, mask) for mask in scene.masks]
        points += [points_in(generator, mask, n_points) for mask in scene.masks]
    grey = torch.from_numpy(np.stack(images))[:, None]
    places = torch.from_numpy(np.stack(points))
    return SceneBatch(
        normalised(grey),
        counts,
        torch.from_numpy(np.stack(boxes)),
        (places, torch.ones(places.shape[:2], dtype=torch.int64)),
        torch.from_numpy(np.concatenate(masks)[:, None]).float(),
        torch.from_numpy(np.stack(painted)).float(),
    )


def normalised(grey: Tensor) -> Tensor:
    """Grey 0 to 255, shape (B, 1, S, S), as SAM's three channels, shape (B, 3, S, S)."""
    from medsam_lora.models.input_spec import PIXEL_MEAN, PIXEL_STD

    return (grey - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


def shaken_box(generator: np.random.Generator, mask: np.ndarray, most: float = 0.1) -> np.ndarray:
    """XYXY of a mask; for half of the draws each edge is moved by up to `most` of the side, inside the picture."""
    i0, j0, i1, j1 = box_of(mask)
    slack = generator.uniform(-most, most, 4) * [j1 - j0, i1 - i0, j1 - j0, i1 - i0]
    if generator.random() < 0.5:
        slack *= 0
    height, width = mask.shape
    return np.clip(np.array([j0, i0, j1, i1]) + slack, 0, [width, height, width, height]).astype(np.float32)


def points_in(generator: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """XY of `count` pixels of a mask, drawn with replacement, shape (count, 2)."""
    rows, columns = np.nonzero(mask)
    chosen = generator.integers(len(rows), size=count)
    return np.stack([columns[chosen], rows[chosen]], axis=1).astype(np.float32)


def pretrain(
    sam: SamModel,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    first: int = 1,
    amp: str = "none",
    on_step: Callable[[int, float, float], None] | None = None,
) -> None:
    """Train a SAM, in place, from step `first` to the last.

    Parameters
    ----------
    sam : SamModel
    optimiser : Optimizer
        Over all of its parameters; `new_optimiser`.
    recipe : Recipe
    first : int
    amp : str
    on_step : callable, optional
        Called after each step with its number, the loss and the mean IoU of its boxes.
    """
    for step in range(first, recipe.steps + 1):
        sam.train()
        loss, iou = train_step(sam, optimiser, recipe, step, amp)
        if on_step is not None:
            on_step(step, loss, iou)
    sam.eval()


def new_optimiser(sam: SamModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over everything that is trained; the Fourier features of prompts are not."""
    parameters: list[Any] = [p for p in sam.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
