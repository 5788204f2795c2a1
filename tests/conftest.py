"""Fixtures shared by all tests: where the real cases and weights are, if anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def brats_dir() -> Path:
    """The folder of real BraTS cases; the test is skipped where there is none."""
    folder = Path(os.environ.get("MEDSAM_LORA_BRATS_DIR", CHECKOUT.parent / "shared" / "data" / "brats"))
    if not folder.is_dir():
        pytest.skip(f"no real BraTS cases at {folder}: set MEDSAM_LORA_BRATS_DIR")
    return folder


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The folder of official weights; the test is skipped where there is none."""
    folder = Path(os.environ.get("MEDSAM_LORA_WEIGHTS_DIR", CHECKOUT.parent / "shared" / "weights"))
    if not folder.is_dir():
        pytest.skip(f"no official weights at {folder}: set MEDSAM_LORA_WEIGHTS_DIR")
    return folder
