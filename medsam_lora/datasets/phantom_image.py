"""From tissue and tumour to four MR images: contrast, vessels, bias field, blur, Rician noise.

Signals are relative to the median of a brain. They, the contrast of tumours and the noise follow what eight real
glioma cases (BraTS 2018) show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from scipy.ndimage import gaussian_filter

from medsam_lora.datasets.phantom_anatomy import Tissue
from medsam_lora.datasets.phantom_tumour import Pathology
from medsam_lora.datasets.random_fields import random_field
from medsam_lora.geometry import Geometry
from medsam_lora.labels import MODALITIES

SIGNALS: Final[Mapping[str, Mapping[str, float]]] = {
    "t1n": {"white": 1.22, "grey": 0.88, "csf": 0.36, "vessel": 0.75, "netc": 0.76, "snfh": 0.86, "et": 0.88},
    "t1c": {"white": 1.14, "grey": 0.93, "csf": 0.38, "vessel": 2.30, "netc": 0.76, "snfh": 0.85, "et": 1.85},
    "t2f": {"white": 0.90, "grey": 1.13, "csf": 0.24, "vessel": 0.35, "netc": 1.60, "snfh": 1.90, "et": 1.85},
    "t2w": {"white": 0.84, "grey": 1.15, "csf": 2.60, "vessel": 0.60, "netc": 2.20, "snfh": 1.90, "et": 1.85},
}
"""Signal of each tissue in each modality; fluid is suppressed on t2f and brightest on t2w."""

_LARGEST = 30000


def render(
    tissue: Tissue, pathology: Pathology | None, points: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Signals at points, before the scanner's own faults.

    Parameters
    ----------
    tissue : Tissue
        At N points.
    pathology : Pathology or None
        At the same points.
    points : ndarray of float32, shape (3, N)
        Head frame, mm.
    generator : numpy.random.Generator

    Returns
    -------
    ndarray of float32, shape (4, N)
        In the order of `labels.MODALITIES`.
    """
    texture = random_field(generator, 9.0).at(points)
    vessel = _vessels(tissue, points, generator)
    contrast = {m: generator.uniform(0.55, 1.15) for m in MODALITIES}
    images = np.empty((len(MODALITIES), points.shape[1]), np.float32)
    for channel, modality in enumerate(MODALITIES):
        signal = {name: value * generator.normal(1, 0.035) for name, value in SIGNALS[modality].items()}
        signal["netc"] *= generator.uniform(0.85, 1.2)
        image = tissue.white * signal["white"] + tissue.grey * signal["grey"] + tissue.csf * signal["csf"]
        image += vessel * (signal["vessel"] - image)
        if pathology is not None:
            image = _with_tumour(image, tissue, pathology, texture, signal, contrast[modality])
        images[channel] = image * (1 + 0.018 * texture)
    return images


def _with_tumour(
    image: np.ndarray,
    tissue: Tissue,
    pathology: Pathology,
    texture: np.ndarray,
    signal: Mapping[str, float],
    contrast: float,
) -> np.ndarray:
    # Oedema fades over some mm of its border, spares cortex in part, and is uneven.
    oedema = np.clip(pathology.oedema / 5 + 0.35, 0, 1) * (1 - tissue.csf) * (1 - 0.45 * tissue.grey)
    oedema *= 0.93 + 0.04 * texture
    image = image + oedema * contrast * (signal["snfh"] - 1)
    core = np.clip(pathology.core / 2.5 + 0.5, 0, 1)
    rim = np.clip((pathology.rim - pathology.core) / 1.2 + 0.5, 0, 1)
    necrosis = 1 + contrast * (signal["netc"] - 1) * (1 + 0.13 * texture)
    enhancing = 1 + contrast * (signal["et"] - 1) * (1 + 0.15 * texture)
    return image + core * (necrosis + rim * (enhancing - necrosis) - image)


def _vessels(tissue: Tissue, points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Share of vessel: where two random sheets meet, in or beside fluid, and the sinus at the top of the fissure."""
    first, second = random_field(generator, 38.0, 0.3), random_field(generator, 38.0, 0.3)
    line = np.hypot(first.at(points), second.at(points))
    beside = np.clip(1.5 - np.abs(tissue.surface) / 2, 0, 1)
    thin = 0.8 * np.clip(1.6 - line / 0.12, 0, 1) * beside
    top = np.clip(1.2 - np.hypot(tissue.midline, tissue.head - 2) / 3.2, 0, 1) * (points[2] > 20)
    return np.clip(np.maximum(thin, top), 0, 1) * (tissue.head > 0)


def scan(
    signals: np.ndarray,
    mask: np.ndarray,
    points: np.ndarray,
    geometry: Geometry,
    generator: np.random.Generator,
) -> np.ndarray:
    """Images as a scanner and a skull strip would leave them.

    Parameters
    ----------
    signals : ndarray of float32, shape (4, N)
        Inside `mask`, in C order.
    mask : ndarray of bool, shape (X, Y, Z)
    points : ndarray of float32, shape (3, N)
        Head frame, mm.
    geometry : Geometry
        Of the mask.
    generator : numpy.random.Generator

    Returns
    -------
    ndarray of int16, shape (4, X, Y, Z)
        0 outside the mask, at least 1 inside.
    """
    images = np.zeros((signals.shape[0], *mask.shape), np.int16)
    coverage = mask.astype(np.float32)
    # The array axis nearest to head-foot.
    upright = int(np.argmax(np.abs(geometry.affine[2, :3]) / geometry.spacing_mm))
    # One generator per channel: how many voxels take noise must not change what the next channel is like.
    for channel, own in enumerate(generator.spawn(signals.shape[0])):
        bias = random_field(own, 220.0).at(points) * np.float32(own.uniform(0.03, 0.09))
        # Some sequences are two-dimensional, with thick slices that were interpolated afterwards.
        thick = own.choice([0.0, 0.0, 1.0]) * own.uniform(0.6, 1.4)
        sigma = [0.45 / step**0.5 for step in geometry.spacing_mm]
        sigma[upright] = float(np.hypot(sigma[upright], thick / geometry.spacing_mm[upright]))
        volume = np.zeros(mask.shape, np.float32)
        volume[mask] = signals[channel] * np.exp(bias)
        # Normalised by the blurred mask, or the rim would darken where the skull strip cut.
        blurred = gaussian_filter(volume, sigma, truncate=3.0)[mask]
        blurred /= np.maximum(gaussian_filter(coverage, sigma, truncate=3.0)[mask], 0.1)
        noise = np.float32(own.uniform(0.012, 0.035))
        # Each modality has a scale of its own, as scanners' have.
        scale = np.float32(np.exp(own.uniform(np.log(110), np.log(900))))
        real = blurred + noise * own.standard_normal(blurred.size, dtype=np.float32)
        imaginary = noise * own.standard_normal(blurred.size, dtype=np.float32)
        images[channel][mask] = np.clip(np.rint(np.hypot(real, imaginary) * scale), 1, _LARGEST).astype(np.int16)
    return images
