"""Smooth random fields in three dimensions: the one source of irregularity of the phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

SAMPLES = 48
"""Lattice points of a field along each axis."""

PER_WAVELENGTH = 6
"""Lattice points per wavelength: trilinear interpolation then errs by a few per cent of the amplitude."""


@dataclass(frozen=True)
class RandomField:
    """A periodic scalar field of mean 0 and standard deviation 1, defined everywhere in space.

    Parameters
    ----------
    values : ndarray of float32, shape (n, n, n)
    step_mm : float
        Distance of neighbouring lattice points.
    """

    values: np.ndarray
    step_mm: float

    def at(self, points: np.ndarray) -> np.ndarray:
        """Value at points, in mm, shape (3, N) to (N,) float32."""
        return map_coordinates(
            self.values, points / np.float32(self.step_mm), output=np.float32, order=1, mode="grid-wrap"
        )

    def gradient_size(self) -> RandomField:
        """The field of the gradient's length, per mm (not normalised)."""
        squared = np.zeros_like(self.values)
        for axis in range(3):
            # Central differences that wrap round, as the field does.
            difference = np.roll(self.values, -1, axis) - np.roll(self.values, 1, axis)
            squared += (difference / np.float32(2 * self.step_mm)) ** 2
        return RandomField(np.sqrt(squared), self.step_mm)


def random_field(generator: np.random.Generator, wavelength_mm: float, bandwidth: float = 0.5) -> RandomField:
    """Draw a Gaussian random field whose power lies around one wavelength.

    Parameters
    ----------
    generator : numpy.random.Generator
    wavelength_mm : float
    bandwidth : float
        Width of the band relative to its centre: 0.15 gives bands of even width that wind like a labyrinth, 1
        gives clouds.

    Examples
    --------
    >>> field = random_field(np.random.default_rng(0), 20.0)
    >>> field.at(np.zeros((3, 2))).shape, round(float(field.values.std()), 3)
    ((2,), 1.0)
    """
    step_mm = wavelength_mm / PER_WAVELENGTH
    white = generator.standard_normal((SAMPLES,) * 3, dtype=np.float32)
    full = np.fft.fftfreq(SAMPLES, step_mm).astype(np.float32)
    half = np.fft.rfftfreq(SAMPLES, step_mm).astype(np.float32)
    frequency = np.sqrt(full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2)
    band = np.exp(-(((frequency * wavelength_mm - 1) / bandwidth) ** 2))
    # The constant term would move the mean.
    band[0, 0, 0] = 0
    values = np.fft.irfftn(np.fft.rfftn(white) * band, s=white.shape)
    return RandomField((values / values.std()).astype(np.float32), step_mm)
