"""The columns of a challenge: which, in which order, and what they are where a mask is empty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medsam_lora.geometry import Geometry
from medsam_lora.io.tables import CHALLENGE_COLUMNS
from medsam_lora.metrics.challenge import challenge_scores, failed_challenge_scores
from medsam_lora.metrics.lesionwise import CHALLENGES, LesionScores, lesionwise
from medsam_lora.metrics.overlap import Comparison, specificity

SHAPE = (20, 12, 10)
GRID = Geometry(SHAPE, np.diag([-1.0, 2.0, 3.0, 1.0]))
EMPTY = np.zeros(SHAPE, bool)


def box(*bounds: tuple[int, int]) -> np.ndarray:
    mask = EMPTY.copy()
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


LESION = box((2, 8), (2, 6), (2, 6))  # 96 voxels, 576 mm³


def test_every_column_by_hand():
    # One voxel (3 mm) along z, and a false positive of 6 mm³ that none of the surfaces' percentiles sees.
    prediction = np.roll(LESION, 1, axis=2) | box((18, 19), (10, 11), (8, 9))
    scores = challenge_scores(Comparison(LESION, prediction, GRID), "brats2023-men")
    assert tuple(scores) == CHALLENGE_COLUMNS
    assert scores["hd95_mm"] == scores["legacy_hd95_mm"] == 3.0
    assert scores["legacy_dice"] == 2 * 72 / (96 + 97)
    assert scores["lesionwise_dice"] == (2 * 72 / (96 + 96)) / 2
    assert scores["lesionwise_hd95_mm"] == (3.0 + 374) / 2
    assert (scores["lesions_tp"], scores["lesions_fp"], scores["lesions_fn"]) == (1, 1, 0)
    assert scores["specificity"] == (2400 - 96 - 25) / (2400 - 96)
    # The sides are common but for their last ring; top and bottom are 3 mm off but near the sides (1 and 2 mm).
    assert 0.5 < scores["nsd_1mm"] < scores["nsd_2mm"] < 1
    assert 0 < scores["assd_mm"] < 3


@pytest.mark.parametrize(
    ("reference", "prediction", "share", "distance", "counts"),
    [
        (EMPTY, EMPTY, 1.0, 0.0, (0, 0, 0)),
        (EMPTY, LESION, 0.0, 374.0, (0, 1, 0)),
        (LESION, EMPTY, 0.0, 374.0, (0, 0, 1)),
        (LESION, LESION, 1.0, 0.0, (1, 0, 0)),
    ],
)
def test_the_policy_of_empty_masks(
    reference: np.ndarray, prediction: np.ndarray, share: float, distance: float, counts: tuple[int, int, int]
):
    scores = challenge_scores(Comparison(reference, prediction, GRID), "brats2023-gli")
    assert [scores[name] for name in ("nsd_1mm", "nsd_2mm", "lesionwise_dice", "legacy_dice")] == [share] * 4
    distances = [scores[name] for name in ("hd95_mm", "assd_mm", "lesionwise_hd95_mm", "legacy_hd95_mm")]
    assert distances == [distance] * 4
    assert tuple(scores[f"lesions_{name}"] for name in ("tp", "fp", "fn")) == counts
    assert scores["specificity"] == (1.0 if not prediction.any() or reference.any() else (2400 - 96) / 2400)


def test_a_failed_prediction_has_the_worst_scores_even_of_an_empty_reference():
    for reference, missed in ((LESION, 1), (EMPTY, 0), (box((2, 3), (2, 3), (2, 3)), 0)):
        scores = failed_challenge_scores(reference, GRID, "brats2023-men")
        assert tuple(scores) == CHALLENGE_COLUMNS
        assert {name: value for name, value in scores.items() if not name.startswith("lesions_")} == {
            "challenge": "brats2023-men",
            **dict.fromkeys(["nsd_1mm", "nsd_2mm", "specificity", "lesionwise_dice", "legacy_dice"], 0.0),
            **dict.fromkeys(["hd95_mm", "assd_mm", "lesionwise_hd95_mm", "legacy_hd95_mm"], 374.0),
        }
        assert (scores["lesions_tp"], scores["lesions_fp"], scores["lesions_fn"]) == (0, 0, missed)


def test_specificity_of_a_full_reference():
    full = ~EMPTY
    assert specificity(Comparison(full, LESION, GRID)) == 1.0
    assert specificity(Comparison(EMPTY, full, GRID)) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_lesions_are_those_of_the_lesionwise_function(seed: int):
    # Whole masks and lesions are measured once where they are the same; the numbers must not show it.
    rng = np.random.default_rng(seed)
    noise = [ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.5 + seed / 2) for _ in range(2)]
    pair = Comparison(noise[0] > 0.1, noise[0] + noise[1] / 2 > 0.1, GRID)
    for name, challenge in CHALLENGES.items():
        scores = challenge_scores(pair, name)
        alone = lesionwise(pair.reference, pair.prediction, GRID.spacing_mm, challenge)
        found = LesionScores(*(scores[c] for c in CHALLENGE_COLUMNS[5:10]))
        assert found == alone
