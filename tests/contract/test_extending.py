"""The code of docs/extending.md works as it stands there, against the same promises as the methods of the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_sam import predict, toy_batch, toy_sam

from medsam_lora.config import MethodConfig
from medsam_lora.geometry import Geometry
from medsam_lora.labels import MODALITIES
from medsam_lora.metrics import score
from medsam_lora.metrics.overlap import Comparison
from medsam_lora.transforms.slicing import SlicingPlan, select_slices

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize(
    ("function", "encoder", "count"),
    [
        # LayerNorms of the toy ViT: two of 32 features in each of two blocks.
        ("attach", "vit", 2 * 2 * 2 * 32),
        ("attach_scaled", "vit", 2 * 32),
        ("attach_scaled", "tiny_vit", 2 * 128 + 6 * 160 + 2 * 320),
    ],
)
@torch.no_grad()
def test_the_methods_of_the_page(page: dict[str, Any], function: str, encoder: str, count: int) -> None:
    model = toy_sam(encoder)
    pixels, boxes, _ = toy_batch()
    base, _ = predict(model, pixels, boxes)
    adaptation = page[function](model, MethodConfig(name="norms"), torch.Generator())
    assert torch.equal(predict(model, pixels, boxes)[0], base)
    assert adaptation.report.count == count
    adaptation.load({name: tensor + 0.1 for name, tensor in adaptation.state().items()})
    adapted, _ = predict(model, pixels, boxes)
    assert not torch.allclose(adapted, base, atol=1e-3)
    merged = toy_sam(encoder)
    merged.load_state_dict(adaptation.merge())
    assert torch.allclose(predict(merged, pixels, boxes)[0], adapted, atol=1e-4)
    adaptation.detach()
    assert torch.equal(predict(model, pixels, boxes)[0], base)
    assert page["entry"]["norms"].mergeable


def test_the_slicing_of_the_page(page: dict[str, Any]) -> None:
    areas = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4, 0])
    taken = select_slices(page["middle_half"], areas, areas > 0, SlicingPlan(), "a")
    assert taken.tolist() == [3, 4, 5, 6]


def test_the_fusion_of_the_page(page: dict[str, Any]) -> None:
    logits = torch.tensor([1.0, -5.0, 2.0, 4.0]).reshape(1, 4, 1, 1, 1)
    fusion = page["MostCertain"](MODALITIES)
    assert fusion(logits).item() == -5.0
    assert fusion(logits[:, [2, 3]], [2, 3]).item() == 4.0


def test_the_metric_of_the_page(page: dict[str, Any]) -> None:
    grid = Geometry((2, 2, 1), np.eye(4))
    reference = np.array([[True, True], [True, False]])[..., None]
    prediction = np.array([[False, False], [False, True]])[..., None]
    metrics = {"volume_similarity": page["volume_similarity_metric"]}
    # Volumes 3 and 1: 1 - 2 / 4.
    assert score(Comparison(reference, prediction, grid), metrics) == {"volume_similarity": 0.5}
    assert score(Comparison(reference, prediction & False, grid), metrics) == {"volume_similarity": 0.0}
