"""A state survives damage by falling back to the one before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medsam_lora.errors import TrainingError
from medsam_lora.training.state import load_state, save_state


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    tensor = torch.randn(5, generator=torch.Generator().manual_seed(0))
    save_state(tmp_path / "last.pt", {"x": tensor, "progress": {"epoch": 3, "rows": [{"loss": 0.1}]}, "best": None})
    state = load_state(tmp_path / "last.pt")
    assert torch.equal(state["x"], tensor)
    assert state["progress"] == {"epoch": 3, "rows": [{"loss": 0.1}]}


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_state_falls_back_to_the_previous_one(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"x": torch.zeros(1000)})
    save_state(path, {"x": torch.ones(1000)})
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    assert load_state(path)["x"].sum() == 0


def test_nothing_to_resume_from_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no such file.*without --resume"):
        load_state(tmp_path / "last.pt")
