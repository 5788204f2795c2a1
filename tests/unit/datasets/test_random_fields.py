"""Random fields: unit variance, the wavelength asked for, periodic, and a function of the generator."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.datasets.random_fields import PER_WAVELENGTH, SAMPLES, RandomField, random_field


@pytest.mark.parametrize("wavelength_mm", [9.0, 60.0])
def test_power_lies_around_the_wavelength(wavelength_mm: float) -> None:
    field = random_field(np.random.default_rng(0), wavelength_mm, 0.2)
    frequency = np.fft.fftfreq(SAMPLES, field.step_mm)
    size = np.sqrt(sum(f**2 for f in np.meshgrid(frequency, frequency, frequency, indexing="ij")))
    power = np.abs(np.fft.fftn(field.values)) ** 2
    assert float((size * power).sum() / power.sum()) * wavelength_mm == pytest.approx(1.0, abs=0.1)
    assert power[np.abs(size * wavelength_mm - 1) > 0.8].sum() < 1e-3 * power.sum()


def test_mean_zero_and_deviation_one() -> None:
    values = random_field(np.random.default_rng(1), 20.0).values
    assert abs(float(values.mean())) < 1e-5
    assert float(values.std()) == pytest.approx(1.0, abs=1e-4)


def test_it_repeats_after_its_period_and_only_then() -> None:
    field = random_field(np.random.default_rng(2), 12.0)
    period = 12.0 / PER_WAVELENGTH * SAMPLES
    points = np.random.default_rng(0).uniform(-50, 50, (3, 40)).astype(np.float32)
    np.testing.assert_allclose(field.at(points + np.float32(period)), field.at(points), atol=1e-3)
    assert np.abs(field.at(points + np.float32(period / 2)) - field.at(points)).max() > 0.5


def test_values_between_lattice_points_by_hand() -> None:
    values = np.zeros((4, 4, 4), np.float32)
    values[1, 0, 0] = 8.0
    field = RandomField(values, 2.0)
    # A quarter of a step beside the point (2, 0, 0) mm along every axis leaves 0.75^3 of the value.
    assert field.at(np.array([[2.5], [0.5], [0.5]], np.float32))[0] == pytest.approx(8 * 0.75**3)
    # Four steps further along, the lattice begins again.
    assert field.at(np.array([[10.0], [0.0], [0.0]], np.float32))[0] == pytest.approx(8.0)


def test_gradient_of_a_wave() -> None:
    n, step = 48, 0.5
    wave = np.sin(2 * np.pi * np.arange(n) / n)[:, None, None] * np.ones((1, n, n))
    slope = RandomField(wave.astype(np.float32), step).gradient_size().values
    expected = np.abs(np.cos(2 * np.pi * np.arange(n) / n)) * 2 * np.pi / (n * step)
    np.testing.assert_allclose(slope[:, 3, 5], expected, atol=0.01 * expected.max())


def test_equal_generators_give_equal_fields() -> None:
    first, again = (random_field(np.random.default_rng(5), 10.0).values for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, random_field(np.random.default_rng(6), 10.0).values)
