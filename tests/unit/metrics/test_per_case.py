"""The rows of per_case.csv and the blocks of summary.json, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medsam_lora.geometry import Geometry
from medsam_lora.metrics.overlap import Comparison, Counts
from medsam_lora.metrics.per_case import (
    NNUNET_METRICS,
    failed_nnunet_metrics,
    failed_scores,
    nnunet_means,
    nnunet_metrics,
    region_scores,
    slices_showing,
)


def test_volumes_come_from_the_affine_not_from_voxel_counts():
    # 0.5 x 2 x 3 mm = 3 mm³ = 0.003 ml per voxel, on an oblique grid (30° about the z axis).
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([0.5, 2, 3])
    reference, prediction = np.zeros((4, 5, 6), bool), np.zeros((4, 5, 6), bool)
    reference[:2, :2, 1:3] = True  # 8 voxels
    prediction[:2, :2, 2:5] = True  # 12 voxels, 4 in common
    row = region_scores(Comparison(reference, prediction, Geometry((4, 5, 6), affine)))
    assert row["reference_volume_ml"] == pytest.approx(0.024)
    assert row["prediction_volume_ml"] == pytest.approx(0.036)
    assert row["volume_difference_ml"] == pytest.approx(0.012)
    back = region_scores(Comparison(prediction, reference, Geometry((4, 5, 6), affine)))
    assert back["volume_difference_ml"] == pytest.approx(-0.012)
    assert row["n_slices"] == 4  # k = 1, 2 of the reference and 2, 3, 4 of the prediction
    assert row["dice"] == 8 / 20


@pytest.mark.parametrize(("codes_axis", "expected"), [(0, 1), (1, 2), (2, 3)])
def test_transverse_slices_follow_the_foot_to_head_axis(codes_axis: int, expected: int):
    # A mask 1 x 2 x 3 voxels long; whichever array axis runs from foot to head is counted.
    affine = np.eye(4)
    columns = [a for a in range(3) if a != codes_axis]
    affine[:3, :3] = 0
    affine[2, codes_axis] = -1  # inferior
    affine[0, columns[0]] = affine[1, columns[1]] = 1
    mask = np.zeros((5, 5, 5), bool)
    mask[1:2, 1:3, 1:4] = True
    assert slices_showing(mask, Geometry((5, 5, 5), affine)) == expected


def test_a_failed_row_is_zero_without_a_prediction_volume():
    reference = np.zeros((4, 4, 4), bool)
    reference[0, 0, :2] = True
    assert failed_scores(reference, Geometry((4, 4, 4), np.eye(4))) == {
        "dice": 0.0,
        "iou": 0.0,
        "sensitivity": 0.0,
        "precision": 0.0,
        "reference_volume_ml": pytest.approx(0.002),
        "prediction_volume_ml": None,
        "n_slices": 2,
        "volume_difference_ml": None,
    }


def test_nnunet_metrics_by_hand():
    found = nnunet_metrics(Counts(tp=6, fp=2, fn=4, tn=88))
    assert tuple(found) == NNUNET_METRICS
    assert found == {
        "Dice": 12 / 18, "IoU": 6 / 12, "TP": 6, "FP": 2, "FN": 4, "TN": 88, "n_pred": 8, "n_ref": 10
    }  # fmt: skip


def test_only_both_empty_is_nan():
    assert math.isnan(nnunet_metrics(Counts(0, 0, 0, 9))["Dice"])
    assert math.isnan(nnunet_metrics(Counts(0, 0, 0, 9))["IoU"])
    assert nnunet_metrics(Counts(0, 3, 0, 6))["Dice"] == 0.0
    assert nnunet_metrics(Counts(0, 0, 3, 6))["Dice"] == 0.0


def test_a_failed_case_is_never_nan():
    # A missing prediction of an empty reference is a failure all the same.
    assert failed_nnunet_metrics(np.zeros((2, 2, 2), bool)) == {
        "Dice": 0.0, "IoU": 0.0, "TP": 0, "FP": 0, "FN": 0, "TN": 8, "n_pred": 0, "n_ref": 0
    }  # fmt: skip


def test_means_leave_nan_out_per_metric():
    cases = [
        {"WT": {"Dice": 0.5, "TP": 2}, "ET": {"Dice": math.nan, "TP": 0}},
        {"WT": {"Dice": 1.0, "TP": 4}, "ET": {"Dice": 0.25, "TP": 1}},
    ]
    mean, foreground = nnunet_means(cases)
    assert mean == {"WT": {"Dice": 0.75, "TP": 3.0}, "ET": {"Dice": 0.25, "TP": 0.5}}
    assert foreground == {"Dice": 0.5, "TP": 1.75}


def test_a_region_empty_everywhere_has_no_mean():
    mean, foreground = nnunet_means([{"WT": {"Dice": 0.5}, "ET": {"Dice": math.nan}}])
    assert mean["WT"] == {"Dice": 0.5}
    assert math.isnan(mean["ET"]["Dice"])
    # As in nnU-Net, whose mean over regions is a plain one.
    assert math.isnan(foreground["Dice"])


def test_no_case_gives_empty_blocks():
    assert nnunet_means([]) == ({}, {})
