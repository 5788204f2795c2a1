"""Pre-training a small SAM on synthetic promptable scenes that are not tumours.

One image of a batch has several objects: the encoder, which costs most, runs once for all of their prompts, as in
SAM's own training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from medsam_lora.models.precision import autocast
from medsam_lora.models.sam import SamModel
from medsam_lora.sam_modules import ImageEncoderViT
from medsam_lora.training.losses import dice_loss, hard_iou
from medsam_lora.training.recipe import Recipe
from medsam_lora.training.scene_batch import scene_batch

POINTS_EVERY, NOTHING_EVERY = 3, 6
"""Steps between those that also ask by points, and by nothing at all."""


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
    course = recipe.course(step)
    batch = scene_batch(recipe.seed, step, range(rank, n_images, world), size, course.shapes, course.shaken)
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
    parameters = [p for p in sam.parameters() if p.requires_grad]
    # A token that no prompt of this process used has no gradient; all processes must send the same.
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= world
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


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
    # Many small tensors: fused, all of them are updated in one call.
    return torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True)
