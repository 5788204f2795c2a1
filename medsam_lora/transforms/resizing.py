"""Between the crop grid and the model frame: SAM's long-side resize with padding, and the way back.

The model frame has a side of S pixels (`image_size`). The image's long side is resized to S, the other in
proportion, and zeros are added at the bottom (rows = X) and right (columns = Y). The rule of sizes is that of
``ResizeLongestSide.get_preprocess_shape`` of segment-anything, the way back that of ``Sam.postprocess_masks``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

Plane = tuple[int, int]

PIXELS_PER_PATCH: Final = 16
PIXELS_PER_GRID_CELL: Final = 4
"""SAM's encoder takes patches of 16 pixels, and its mask decoder enlarges their grid fourfold."""


def model_scale(shape: Plane, image_size: int) -> tuple[float, Plane]:
    """Scale to the model frame, and the size there without padding.

    Parameters
    ----------
    shape : tuple of int, (X, Y)
        Crop grid.
    image_size : int
        S.

    Returns
    -------
    scale : float
        Model pixels per voxel.
    size : tuple of int, (h, w)
        Rounded half up, so that the short side is up to half a model pixel longer or shorter than scale times X.

    Examples
    --------
    >>> scale, size = model_scale((138, 202), 1024)
    >>> round(scale, 4), size
    (5.0693, (700, 1024))
    """
    x, y = shape
    scale = image_size * 1.0 / max(x, y)
    return scale, (int(x * scale + 0.5), int(y * scale + 0.5))


def covered_frame(shape: Plane, image_size: int) -> Plane:
    """The smallest part of the model frame, in whole patches from its corner, that the image lies in.

    Parameters
    ----------
    shape : tuple of int, (X, Y)
        Crop grid.
    image_size : int
        S.

    Returns
    -------
    tuple of int, (h, w)
        Multiples of 16.

    Examples
    --------
    >>> covered_frame((138, 202), 1024)
    (704, 1024)
    """
    _, (h, w) = model_scale(shape, image_size)
    return -(-h // PIXELS_PER_PATCH) * PIXELS_PER_PATCH, -(-w // PIXELS_PER_PATCH) * PIXELS_PER_PATCH


def to_model_frame(images: Tensor, image_size: int, frame: Plane | None = None) -> Tensor:
    """Resize pixels to the model frame, bilinearly, and pad with zeros at the bottom and right.

    Parameters
    ----------
    images : Tensor of float, shape (B, C, X, Y)
        Normalised pixels on the crop grid (the padding of 0 is SAM's mean colour only after its normalisation).
    image_size : int
        S.
    frame : tuple of int, (h, w), optional
        Pad to this part of the frame alone (`covered_frame`); to all of it by default.

    Returns
    -------
    Tensor of float, shape (B, C, S, S) or (B, C, h, w)
    """
    _, size = model_scale((images.shape[-2], images.shape[-1]), image_size)
    resized = functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=False)
    return _padded(resized, frame or (image_size, image_size))


def masks_to_model_frame(masks: Tensor, image_size: int) -> Tensor:
    """Resize masks or label maps to the model frame by nearest neighbour, and pad with 0.

    Parameters
    ----------
    masks : Tensor of bool or uint8, shape (B, R, X, Y)
    image_size : int
        S.

    Returns
    -------
    Tensor, shape (B, R, S, S), dtype of `masks`
    """
    _, size = model_scale((masks.shape[-2], masks.shape[-1]), image_size)
    return _padded(_nearest(masks, size), (image_size, image_size))


def masks_from_model_frame(masks: Tensor, shape: Plane) -> Tensor:
    """The way back of `masks_to_model_frame`, exact where the model frame is no coarser than the crop grid.

    Parameters
    ----------
    masks : Tensor of bool or uint8, shape (B, R, S, S)
    shape : tuple of int, (X, Y)

    Returns
    -------
    Tensor, shape (B, R, X, Y), dtype of `masks`
    """
    _, (h, w) = model_scale(shape, masks.shape[-1])
    return _nearest(masks[..., :h, :w], shape)


def to_native_frame(logits: Tensor, image_size: int, shape: Plane, frame: Plane | None = None) -> Tensor:
    """Bring the decoder's logits back to the crop grid, in float32, differentiably.

    Bilinear from the decoder grid to the S x S frame, without the padding, bilinear to the crop grid: both steps of
    ``Sam.postprocess_masks``. Each is linear along rows and along columns, so the two together are one matrix per
    axis; the S x S frame, 25 times the memory of a 138 x 202 crop, is never made.

    Parameters
    ----------
    logits : Tensor of float, shape (B, R, h, w)
        On the decoder grid.
    image_size : int
        S.
    shape : tuple of int, (X, Y)
    frame : tuple of int, optional
        Model pixels that the decoder grid covers; the whole padded frame by default.

    Returns
    -------
    Tensor of float32, shape (B, R, X, Y)
    """
    _, (rows, columns) = model_scale(shape, image_size)
    # Under autocast a matrix product would run in half precision, which moves the contour.
    with torch.autocast(logits.device.type, enabled=False):
        frame = frame or (image_size, image_size)
        left = _two_resizes(logits.shape[-2], frame[0], rows, shape[0]).to(logits.device)
        right = _two_resizes(logits.shape[-1], frame[1], columns, shape[1]).to(logits.device)
        return left @ logits.float() @ right.T


def through_decoder_grid(masks: Tensor, image_size: int) -> Tensor:
    """The best that a mask decoder can say of these masks: what its grid of S / 4 pixels leaves of them.

    The masks in the model frame are averaged over each pixel of the decoder grid; that is brought back as predicted
    logits are, and cut at one half.

    Parameters
    ----------
    masks : Tensor of bool, shape (B, R, X, Y)
    image_size : int
        S.

    Returns
    -------
    Tensor of bool, shape (B, R, X, Y)
    """
    framed = masks_to_model_frame(masks, image_size).float()
    share = functional.avg_pool2d(framed, PIXELS_PER_GRID_CELL)
    return to_native_frame(share, image_size, (masks.shape[-2], masks.shape[-1])) > 0.5


@lru_cache(maxsize=64)
def _two_resizes(n_grid: int, n_frame: int, used: int, n_native: int) -> Tensor:
    """Matrix (n_native, n_grid) of: resize n_grid to n_frame, keep the first `used`, resize to n_native."""
    # inference_mode(False): a tensor cached under inference mode could not enter a later training step.
    with torch.inference_mode(False), torch.no_grad():
        basis = torch.eye(n_grid, dtype=torch.float64)[None]
        frame = functional.interpolate(basis, n_frame, mode="linear", align_corners=False)[..., :used]
        native = functional.interpolate(frame, n_native, mode="linear", align_corners=False)
        return native[0].T.contiguous().float()


def _nearest(masks: Tensor, size: Plane) -> Tensor:
    # nearest-exact takes the voxel under a pixel's centre; plain "nearest" is off by up to a voxel.
    # Interpolation knows no bool; uint8 holds labels exactly.
    moved = functional.interpolate(masks.to(torch.uint8), size, mode="nearest-exact")
    return moved.to(masks.dtype)


def _padded(images: Tensor, frame: Plane) -> Tensor:
    h, w = images.shape[-2:]
    return functional.pad(images, (0, frame[1] - w, 0, frame[0] - h))
