"""Lesion-wise and legacy scores against those of the BraTS 2023 evaluation, for synthetic label maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medsam_lora import labels
from medsam_lora.geometry import Geometry
from medsam_lora.metrics.lesionwise import CHALLENGES, lesionwise
from medsam_lora.metrics.overlap import Comparison, specificity
from medsam_lora.metrics.surface import robust_hausdorff, surface_distances

VECTORS = json.loads((Path(__file__).parent / "data" / "brats2023_lesionwise.json").read_text())
SHAPE = tuple(VECTORS["shape"])


def label_map(runs: list[list[int]]) -> np.ndarray:
    flat = np.zeros(int(np.prod(SHAPE)), np.uint8)
    for start, length, label in runs:
        flat[start : start + length] = label
    return flat.reshape(SHAPE)


def region(runs: list[list[int]], name: str) -> np.ndarray:
    # By value, not by label convention: the evaluation ignores labels that it does not know.
    return np.isin(label_map(runs), labels.REGIONS[name])


def legacy(reference: np.ndarray, prediction: np.ndarray) -> tuple[float, float]:
    if not reference.any() and not prediction.any():
        return 1.0, 0.0
    if not reference.any() or not prediction.any():
        return 0.0, 374.0
    both = 2 * np.count_nonzero(reference & prediction) / (reference.sum() + prediction.sum())
    return both, robust_hausdorff(surface_distances(reference, prediction, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("name", VECTORS["cases"])
def test_equal_to_the_evaluation_of_brats_2023(name: str):
    case = VECTORS["cases"][name]
    assert len(case["results"]) == 9
    for key, values in case["results"].items():
        challenge, region_name = key.split("/")
        expected = dict(zip(VECTORS["columns"], values, strict=True))
        reference, prediction = (region(case[which], region_name) for which in ("reference", "prediction"))
        found = lesionwise(reference, prediction, (1.0, 1.0, 1.0), CHALLENGES[f"brats2023-{challenge}"])
        dice, hd95 = legacy(reference, prediction)
        assert {
            "Num_TP": found.tp,
            "Num_FP": found.fp,
            "Num_FN": found.fn,
            "Specificity": specificity(Comparison(reference, prediction, Geometry(SHAPE, np.eye(4)))),
            "Legacy_Dice": dice,
            "Legacy_HD95": hd95,
            "LesionWise_Score_Dice": found.dice,
            "LesionWise_Score_HD95": found.hd95_mm,
        } == pytest.approx(expected, rel=0, abs=1e-9), key


def test_the_vectors_tell_the_challenges_apart():
    differing = [
        name
        for name, case in VECTORS["cases"].items()
        if any(len({str(case["results"][f"{c}/{r}"]) for c in ("gli", "men", "met")}) > 1 for r in labels.REGIONS)
    ]
    assert len(differing) >= 5
    assert len(VECTORS["cases"]) == 17
