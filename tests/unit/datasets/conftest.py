"""The dozen phantom cases that several tests look at, made once."""

from __future__ import annotations

import pytest

from medsam_lora.datasets.phantom import PhantomCase, make_case


@pytest.fixture(scope="session")
def dozen() -> list[PhantomCase]:
    """The first twelve cases of cohort 0, at the demo's shape."""
    return [make_case(0, index) for index in range(12)]
