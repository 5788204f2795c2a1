"""Prepared slices made in memory, for training and validation."""

from __future__ import annotations

import pytest
from prepared_cases import make_case

from medsam_lora.records import PreparedSlices


@pytest.fixture
def training_cases() -> list[PreparedSlices]:
    return [make_case("a", "train", 0), make_case("b", "train", 1)]


@pytest.fixture
def validation_cases() -> list[PreparedSlices]:
    return [make_case("c", "val", 2)]
