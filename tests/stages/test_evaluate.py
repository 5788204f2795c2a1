"""The evaluate stage on small cohorts whose every score is counted by hand."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.errors import ConfigError, DataError, ManifestError
from medsam_lora.geometry import Geometry
from medsam_lora.io.nifti import write_label_map
from medsam_lora.io.tables import (
    BOX_COLUMNS,
    CHALLENGE_COLUMNS,
    FINDING_COLUMNS,
    MANIFEST_COLUMNS,
    PER_CASE_COLUMNS,
    write_table,
)
from medsam_lora.stages.evaluate import evaluate

SHAPE = (10, 10, 6)
GRID = Geometry(SHAPE, np.array([[-2, 0, 0, 0], [0, -1, 0, 9], [0, 0, 3, 0], [0, 0, 0, 1.0]]))
VOXEL_ML = 0.006


def block(*boxes: tuple[int, tuple[int, int, int], tuple[int, int, int]]) -> np.ndarray:
    """A label map of boxes (label, low, high), half-open."""
    label_map = np.zeros(SHAPE, np.uint8)
    for label, low, high in boxes:
        label_map[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = label
    return label_map


# 4 x 4 x 2 = 32 voxels, of which 2 x 2 x 2 = 8 enhance and 4 x 1 x 2 = 8 are necrotic.
TUMOUR = block((2, (1, 1, 1), (5, 5, 3)), (3, (1, 1, 1), (3, 3, 3)), (1, (1, 4, 1), (5, 5, 3)))


class Cohort:
    """A data root, its manifest and a folder of predictions, filled case by case."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "m.csv"
        self.predictions = root / "preds"
        self.predictions.mkdir()
        self.out = root / "scores"
        self.lines: list[dict] = []

    def add(
        self,
        case_id: str,
        reference: np.ndarray | None,
        prediction: np.ndarray | None = None,
        *,
        patient: str | None = None,
        split: str = "",
        convention: str = "brats2023",
        grid: Geometry = GRID,
    ) -> None:
        seg = ""
        if reference is not None:
            seg = f"{case_id}-seg.nii.gz"
            write_label_map(self.root / seg, reference, GRID)
        if prediction is not None:
            write_label_map(self.predictions / f"{case_id}.nii.gz", prediction, grid)
        self.lines.append(
            dict.fromkeys(MANIFEST_COLUMNS, "")
            | {
                "case_id": case_id,
                "patient_id": patient or case_id,
                "split": split,
                "seg": seg,
                "label_convention": convention,
            }
        )
        write_table(self.manifest, MANIFEST_COLUMNS, self.lines)

    def record(self, **keys: object) -> None:
        (self.predictions / "record.json").write_text(json.dumps(keys))

    def evaluate(self, **options: object):
        return evaluate(self.manifest, None, self.predictions, self.out, bootstrap=200, **options)

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.out / name).open(newline="") as handle:
            return list(csv.DictReader(handle))

    def summary(self) -> dict:
        return json.loads((self.out / "summary.json").read_text())


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort(tmp_path)


def by_case(rows: list[dict], method: str | None = None) -> dict[tuple[str, str], dict]:
    return {(r["case_id"], r["region"]): r for r in rows if method in (None, r["method"])}


def test_scores_of_a_label_map_by_hand(cohort: Cohort):
    # Half the tumour in k (16 of 32), ET exact in that half (4 of 8), NETC called oedema (TC: 4 of 16).
    prediction = np.where(TUMOUR == 1, 2, TUMOUR)
    prediction[:, :, 2] = 0
    cohort.add("a", TUMOUR, TUMOUR)
    cohort.add("b", TUMOUR, prediction)
    rows, outcome = cohort.evaluate()
    assert (outcome.exit_code, outcome.done, outcome.failed) == (0, ["a", "b"], [])
    assert len(rows) == 6
    scores = by_case(rows)
    for region in ("WT", "TC", "ET"):
        assert [scores["a", region][m] for m in ("dice", "iou", "sensitivity", "precision")] == [1.0] * 4
    whole, core, et = (scores["b", region] for region in ("WT", "TC", "ET"))
    assert (whole["dice"], whole["iou"], whole["sensitivity"], whole["precision"]) == (32 / 48, 0.5, 0.5, 1.0)
    assert (core["dice"], core["sensitivity"]) == (8 / 20, 0.25)
    assert (et["dice"], et["sensitivity"]) == (8 / 12, 0.5)
    assert whole["reference_volume_ml"] == pytest.approx(32 * VOXEL_ML)
    assert whole["prediction_volume_ml"] == pytest.approx(16 * VOXEL_ML)
    assert whole["volume_difference_ml"] == pytest.approx(-16 * VOXEL_ML)
    assert (whole["n_slices"], et["n_slices"]) == (2, 2)


def test_per_case_csv_holds_the_rows_and_no_other_columns(cohort: Cohort):
    cohort.add("a", TUMOUR, TUMOUR, patient="p1")
    rows, _ = cohort.evaluate()
    with (cohort.out / "per_case.csv").open() as handle:
        assert handle.readline().strip().split(",") == list(PER_CASE_COLUMNS)
    read = cohort.table("per_case.csv")
    assert [{k: str(v) for k, v in row.items()} for row in rows] == [
        {k: r[k] for k in row} for r, row in zip(read, rows, strict=True)
    ]
    assert read[0] == {
        "case_id": "a",
        "patient_id": "p1",
        "run": "preds",
        "method": "preds",
        "region": "WT",
        "dice": "1.0",
        "iou": "1.0",
        "sensitivity": "1.0",
        "precision": "1.0",
        "reference_volume_ml": repr(32 * VOXEL_ML),
        "prediction_volume_ml": repr(32 * VOXEL_ML),
        "n_slices": "2",
        "prompt_source": "unknown",
        "status": "ok",
        "postprocess": "none",
        "volume_difference_ml": "0.0",
    }


def test_summary_csv_counts_patients_once(cohort: Cohort):
    half = np.where(np.arange(SHAPE[2]) == 1, TUMOUR, 0)
    cohort.add("a-0", TUMOUR, TUMOUR, patient="a")
    cohort.add("a-1", TUMOUR, half, patient="a")
    cohort.evaluate(regions=["WT"])
    (line,) = cohort.table("summary.csv")
    # One patient: nothing to resample, so the interval is the mean (1 + 2/3) / 2.
    mean = pytest.approx((1 + 2 / 3) / 2)
    assert (line["method"], line["region"], line["n_cases"]) == ("preds", "WT", "2")
    assert [float(line[k]) for k in ("dice_mean", "dice_low", "dice_high")] == [mean] * 3


def test_summary_json_has_the_shape_of_nnunet(cohort: Cohort):
    half = np.where(np.arange(SHAPE[2]) == 1, TUMOUR, 0)
    cohort.add("a", TUMOUR, half)
    cohort.add("b", np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8))
    rows, _ = cohort.evaluate(regions=["WT"])
    summary = cohort.summary()
    assert {"metric_per_case", "mean", "foreground_mean", "conventions"} == set(summary)
    first, second = summary["metric_per_case"]
    assert first["reference_file"].endswith("a-seg.nii.gz")
    assert first["prediction_file"].endswith("preds/a.nii.gz")
    assert first["metrics"] == {
        "WT": {"Dice": 2 / 3, "IoU": 0.5, "TP": 16, "FP": 0, "FN": 16, "TN": 600 - 32, "n_pred": 16, "n_ref": 32}
    }
    # Both empty: NaN here alone, left out of the mean with the count stated; 1 in the table.
    assert '"Dice": NaN' in (cohort.out / "summary.json").read_text()
    assert math.isnan(second["metrics"]["WT"]["Dice"])
    assert math.isnan(second["metrics"]["WT"]["IoU"])
    # What readers do with it.
    assert np.nanmean([e["metrics"]["WT"]["Dice"] for e in summary["metric_per_case"]]) == 2 / 3
    assert summary["mean"]["WT"]["Dice"] == 2 / 3
    assert summary["mean"]["WT"]["n_ref"] == 16.0
    assert summary["foreground_mean"]["Dice"] == 2 / 3
    assert summary["conventions"]["both_empty_left_out"] == {"WT": 1}
    assert [row["dice"] for row in rows] == [2 / 3, 1.0]


def test_both_empty_is_one_and_one_empty_is_zero(cohort: Cohort):
    nothing = np.zeros(SHAPE, np.uint8)
    cohort.add("both", nothing, nothing)
    cohort.add("no_reference_tumour", nothing, TUMOUR)
    cohort.add("no_prediction", TUMOUR, nothing)
    rows, outcome = cohort.evaluate(regions=["WT"])
    assert outcome.exit_code == 0
    assert {r["case_id"]: (r["dice"], r["iou"], r["sensitivity"], r["precision"]) for r in rows} == {
        "both": (1.0,) * 4,
        "no_reference_tumour": (0.0,) * 4,
        "no_prediction": (0.0,) * 4,
    }
    assert {r["case_id"]: r["n_slices"] for r in rows} == {"both": 0, "no_reference_tumour": 2, "no_prediction": 2}


def broken_cohort(cohort: Cohort) -> None:
    moved, nudged = GRID.affine.copy(), GRID.affine.copy()
    moved[0, 3] += 1.0
    nudged[0, 3] += 1e-4
    cohort.add("good", TUMOUR, TUMOUR)
    cohort.add("absent", TUMOUR)
    cohort.add("moved", TUMOUR, TUMOUR, grid=Geometry(SHAPE, moved))
    cohort.add("nudged", TUMOUR, TUMOUR, grid=Geometry(SHAPE, nudged))
    cohort.add("cropped", TUMOUR, TUMOUR[:9], grid=Geometry((9, 10, 6), GRID.affine))
    cohort.add("label_4", TUMOUR, np.where(TUMOUR == 3, 4, TUMOUR))
    cohort.add("cut", TUMOUR, TUMOUR)
    file = cohort.predictions / "cut.nii.gz"
    file.write_bytes(file.read_bytes()[:-12])
    cohort.add("probability", TUMOUR)
    image = nib.Nifti1Image((TUMOUR > 0).astype(np.float32) * 0.7, GRID.affine)
    nib.save(image, cohort.predictions / "probability.nii.gz")
    cohort.add("empty_and_absent", np.zeros(SHAPE, np.uint8))


def test_unusable_predictions_are_failed_rows_with_a_reason(cohort: Cohort):
    broken_cohort(cohort)
    rows, outcome = cohort.evaluate(regions=["WT"])
    status = {r["case_id"]: r["status"] for r in rows}
    assert status == {
        "good": "ok",
        "absent": "missing",
        "moved": "wrong_grid",
        "nudged": "ok",
        "cropped": "wrong_grid",
        "label_4": "wrong_label",
        "cut": "missing",
        "probability": "wrong_label",
        "empty_and_absent": "missing",
    }
    for row in rows:
        assert row["dice"] == row["iou"] == row["sensitivity"] == row["precision"] == float(row["status"] == "ok")
        assert (row["prediction_volume_ml"] is None) == (row["status"] != "ok")
    assert by_case(rows)["absent", "WT"]["reference_volume_ml"] == pytest.approx(32 * VOXEL_ML)
    assert outcome.exit_code == 1
    assert outcome.done == ["good", "nudged"]
    assert len(outcome.failed) == 7
    failures = {line["case_id"]: line for line in cohort.table("failures.csv")}
    assert tuple(next(iter(failures.values()))) == FINDING_COLUMNS
    assert {k: v["code"] for k, v in failures.items()} == {k: v for k, v in status.items() if v != "ok"}
    assert all(line["severity"] == "error" and line["detail"] and line["remedy"] for line in failures.values())
    assert "(9, 10, 6)" in failures["cropped"]["detail"]
    assert "4 (8 voxels)" in failures["label_4"]["detail"]
    assert failures["cut"]["file"] == "cut.nii.gz"


def test_failed_rows_stay_in_every_mean(cohort: Cohort):
    broken_cohort(cohort)
    cohort.evaluate(regions=["WT"])
    (line,) = cohort.table("summary.csv")
    assert line["n_cases"] == "9"
    assert float(line["dice_mean"]) == pytest.approx(2 / 9)
    summary = cohort.summary()
    assert summary["mean"]["WT"]["Dice"] == pytest.approx(2 / 9)
    assert summary["conventions"]["n_failed"] == 7
    # An empty reference whose prediction is missing is a failure, not "both empty".
    assert summary["conventions"]["both_empty_left_out"] == {"WT": 0}
    metrics = {Path(e["prediction_file"]).name: e for e in summary["metric_per_case"]}
    assert metrics["absent.nii.gz"]["status"] == "missing"
    assert metrics["absent.nii.gz"]["metrics"]["WT"]["FN"] == 32


def test_a_prediction_of_brats2018_may_use_label_4(cohort: Cohort):
    with_four = np.where(TUMOUR == 3, 4, TUMOUR)
    cohort.add("a", with_four, with_four, convention="brats2018")
    cohort.add("b", with_four, TUMOUR, convention="brats2018")
    rows, outcome = cohort.evaluate()
    scores = by_case(rows)
    assert [scores["a", r]["dice"] for r in ("WT", "TC", "ET")] == [1.0, 1.0, 1.0]
    assert [scores["b", r]["status"] for r in ("WT", "TC", "ET")] == ["wrong_label"] * 3
    assert [f.case_id for f in outcome.failed] == ["b"]


def test_a_binary_reference_is_scored_on_the_whole_tumour_alone(cohort: Cohort):
    cohort.add("a", TUMOUR > 0, TUMOUR > 0, convention="binary")
    rows, _ = cohort.evaluate()
    assert [(r["region"], r["dice"]) for r in rows] == [("WT", 1.0)]


def test_record_says_run_method_regions_and_labels(cohort: Cohort):
    cohort.record(
        run="fold_0", method="lora", prompt_source="reference_box", regions=["WT"], labels={"1": "WT"}, cases=["a"]
    )
    cohort.add("a", TUMOUR, TUMOUR > 0)
    rows, _ = cohort.evaluate()
    (row,) = rows
    assert (row["region"], row["dice"]) == ("WT", 1.0), "only trained regions are scored"
    assert (row["run"], row["method"], row["prompt_source"]) == ("fold_0", "lora", "reference_box")
    (row,), _ = cohort.evaluate(run="again", method="mine")
    assert (row["run"], row["method"], row["prompt_source"]) == ("again", "mine", "reference_box")
    assert cohort.summary()["conventions"]["method"] == "mine"


def test_a_label_the_record_does_not_name_is_wrong(cohort: Cohort):
    cohort.record(regions=["WT"], labels={"1": "WT"})
    cohort.add("a", TUMOUR, TUMOUR)  # values 2 and 3 mean nothing to a whole-tumour model
    (row,), outcome = cohort.evaluate()
    assert (row["status"], row["dice"]) == ("wrong_label", 0.0)
    assert "2 (16 voxels), 3 (8 voxels)" in outcome.failed[0].detail


def test_regions_that_cannot_be_scored_are_refused(cohort: Cohort):
    cohort.record(regions=["WT"], labels={"1": "WT"})
    cohort.add("a", TUMOUR, TUMOUR > 0)
    with pytest.raises(ConfigError, match="not trained for the region TC"):
        cohort.evaluate(regions=["TC"])
    with pytest.raises(ConfigError, match=r"unknown region 'wt'.*Did you mean WT"):
        cohort.evaluate(regions=["wt"])
    with pytest.raises(ConfigError, match="no region"):
        cohort.evaluate(regions=[])
    assert not cohort.out.exists(), "refused before any work"


def test_which_cases_are_scored(cohort: Cohort):
    cohort.add("a", TUMOUR, TUMOUR, split="train")
    cohort.add("b", TUMOUR, TUMOUR, split="test")
    cohort.add("c", TUMOUR, None, split="test")
    assert [r["case_id"] for r in cohort.evaluate(regions=["WT"])[0]] == ["a", "b", "c"]
    assert [r["case_id"] for r in cohort.evaluate(regions=["WT"], split="train")[0]] == ["a"]
    cohort.record(cases=["c", "b"])
    rows, outcome = cohort.evaluate(regions=["WT"])
    assert [(r["case_id"], r["status"]) for r in rows] == [("c", "missing"), ("b", "ok")]
    assert outcome.exit_code == 1
    # A split asked for is scored whole, whatever was predicted of it.
    assert [r["case_id"] for r in cohort.evaluate(regions=["WT"], split="test")[0]] == ["b", "c"]


def test_a_case_the_manifest_does_not_list_is_reported(cohort: Cohort):
    cohort.add("a", TUMOUR, TUMOUR)
    write_label_map(cohort.predictions / "stray.nii.gz", TUMOUR, GRID)
    cohort.record(cases=["a", "gone"])
    rows, outcome = cohort.evaluate(regions=["WT"])
    assert [r["case_id"] for r in rows] == ["a"]
    assert [(f.case_id, f.code) for f in outcome.failed] == [("gone", "unknown_case")]
    findings = {(f["case_id"], f["code"], f["severity"]) for f in cohort.table("failures.csv")}
    assert findings == {("gone", "unknown_case", "error"), ("stray", "unknown_prediction", "warning")}


def test_a_case_without_reference_is_a_warning(cohort: Cohort):
    cohort.add("a", TUMOUR, TUMOUR)
    cohort.add("b", None, TUMOUR)
    rows, outcome = cohort.evaluate(regions=["WT"])
    assert [r["case_id"] for r in rows] == ["a"]
    assert (outcome.exit_code, outcome.done, outcome.skipped) == (0, ["a"], ["b"])
    assert [(f["case_id"], f["severity"]) for f in cohort.table("failures.csv")] == [("b", "warning")]


def test_an_unreadable_reference_is_an_error_and_the_rest_go_on(cohort: Cohort):
    cohort.add("a", TUMOUR, TUMOUR)
    cohort.add("b", TUMOUR, TUMOUR)
    cohort.add("c", np.where(TUMOUR == 3, 4, TUMOUR), TUMOUR)
    file = cohort.root / "b-seg.nii.gz"
    file.write_bytes(file.read_bytes()[:-4])
    rows, outcome = cohort.evaluate(regions=["WT"])
    assert [r["case_id"] for r in rows] == ["a"]
    assert outcome.exit_code == 1
    found = {f.case_id: f for f in outcome.failed}
    assert found["b"].file == "b-seg.nii.gz"
    assert found["c"].code == "unexpected_label"
    assert "brats2018" in found["c"].remedy


def boxes_of(path: Path, *lines: tuple) -> Path:
    write_table(path, BOX_COLUMNS, [dict(zip(BOX_COLUMNS, line, strict=True)) for line in lines])
    return path


def test_the_floor_fills_each_box(cohort: Cohort):
    # Reference: an L of 3 x 1 + 1 x 3 - 1 = 5 voxels on slice 1 and 4 voxels on slice 2, whose boxes hold 9 and 4.
    reference = block((1, (2, 2, 1), (5, 3, 2)), (2, (2, 2, 1), (3, 5, 2)), (3, (6, 6, 2), (8, 8, 3)))
    cohort.record(run="r", method="lora", prompt_source="reference_box", regions=["WT"], labels={"1": "WT"})
    cohort.add("a", reference, reference > 0, patient="p")
    boxes_of(cohort.predictions / "prompts.csv", ("a", 1, 2, 2, 5, 5), ("a", 2, 6, 6, 8, 8))
    rows, outcome = cohort.evaluate()
    assert outcome.exit_code == 0
    method, floor = rows
    assert (method["method"], method["dice"]) == ("lora", 1.0)
    assert (floor["method"], floor["run"], floor["region"], floor["patient_id"]) == ("filled_box", "r", "WT", "p")
    assert (floor["prompt_source"], floor["status"]) == ("reference_box", "ok")
    assert floor["dice"] == 2 * 9 / (9 + 13)
    assert (floor["sensitivity"], floor["precision"]) == (1.0, 9 / 13)
    assert floor["prediction_volume_ml"] == pytest.approx(13 * VOXEL_ML)
    assert [(r["method"], float(r["dice_mean"])) for r in cohort.table("summary.csv")] == [
        ("lora", 1.0),
        ("filled_box", 18 / 22),
    ]
    assert len(cohort.summary()["metric_per_case"]) == 1, "the floor has no prediction file"


def test_the_floor_from_a_given_table(cohort: Cohort, tmp_path: Path):
    cohort.add("a", TUMOUR, TUMOUR)
    path = boxes_of(tmp_path / "boxes.csv", ("a", 1, 1, 1, 5, 5))
    rows, _ = cohort.evaluate(boxes=path)
    assert [(r["method"], r["region"]) for r in rows] == [
        ("preds", "WT"),
        ("preds", "TC"),
        ("preds", "ET"),
        ("filled_box", "WT"),
        ("filled_box", "TC"),
        ("filled_box", "ET"),
    ]
    # One of two slices boxed with 16 voxels, all of them in the tumour of 32, 8 in its core of 16, 4 in ET of 8.
    floor = by_case(rows, "filled_box")
    assert [floor["a", r]["dice"] for r in ("WT", "TC", "ET")] == [2 * 16 / 48, 2 * 8 / 32, 2 * 4 / 24]
    assert [floor["a", r]["precision"] for r in ("WT", "TC", "ET")] == [1.0, 0.5, 0.25]
    assert {r["prompt_source"] for r in floor.values()} == {"box_table"}
    only = cohort.evaluate(boxes=path, regions=["TC"])[0]
    assert [(r["method"], r["region"], r["dice"]) for r in only] == [("preds", "TC", 1.0), ("filled_box", "TC", 0.5)]


def test_the_floor_is_of_the_box_and_not_of_what_was_done_to_masks(cohort: Cohort):
    cohort.record(method="lora", labels={"1": "WT"}, regions=["WT"], postprocess="holes filled")
    cohort.add("a", TUMOUR, TUMOUR > 0)
    boxes_of(cohort.predictions / "prompts.csv", ("a", 1, 1, 1, 5, 5))
    assert [(r["method"], r["postprocess"]) for r in cohort.evaluate()[0]] == [
        ("lora", "holes filled"),
        ("filled_box", "none"),
    ]


def test_the_floor_of_cases_without_boxes(cohort: Cohort):
    nothing = np.zeros(SHAPE, np.uint8)
    cohort.add("boxed", TUMOUR, TUMOUR)
    cohort.add("no_tumour", nothing, nothing)
    cohort.add("never_predicted", TUMOUR)
    boxes_of(cohort.predictions / "prompts.csv", ("boxed", 1, 1, 1, 5, 5), ("boxed", 2, 1, 1, 5, 5))
    rows, _ = cohort.evaluate(regions=["WT"])
    floor = {r["case_id"]: (r["dice"], r["status"]) for r in rows if r["method"] == "filled_box"}
    assert floor == {"boxed": (1.0, "ok"), "no_tumour": (1.0, "ok"), "never_predicted": (0.0, "missing")}


def test_a_challenge_adds_its_columns_and_tables(cohort: Cohort):
    # 32 voxels of 6 mm³ are one lesion that counts; the prediction finds slice 1 of 2 and has one voxel in vain.
    half = np.where(np.arange(SHAPE[2]) == 1, TUMOUR, 0)
    half[9, 9, 5] = 2
    cohort.add("a", TUMOUR, TUMOUR)
    cohort.add("b", TUMOUR, half)
    cohort.add("c", TUMOUR)
    plain, _ = cohort.evaluate(regions=["WT"])
    before = cohort.table("per_case.csv")
    assert not (cohort.out / "all_scores.csv").exists()
    rows, outcome = cohort.evaluate(regions=["WT"], challenge="brats2023-men")
    assert [f.case_id for f in outcome.failed] == ["c"]
    with (cohort.out / "per_case.csv").open() as handle:
        assert handle.readline().strip().split(",") == [*PER_CASE_COLUMNS, *CHALLENGE_COLUMNS]
    after = cohort.table("per_case.csv")
    assert [{key: line[key] for key in PER_CASE_COLUMNS} for line in after] == before
    assert [{key: row[key] for key in PER_CASE_COLUMNS} for row in rows] == plain
    exact, found, lost = rows
    assert [row["challenge"] for row in rows] == ["brats2023-men"] * 3
    assert [exact[key] for key in ("hd95_mm", "nsd_1mm", "assd_mm", "specificity", "lesionwise_dice")] == [
        0,
        1,
        0,
        1,
        1,
    ]
    assert (found["lesions_tp"], found["lesions_fp"], found["lesions_fn"]) == (1, 1, 0)
    assert found["lesionwise_dice"] == (2 * 16 / 48) / 2
    assert found["legacy_dice"] == found["dice"] == 2 * 16 / 49
    assert (lost["status"], lost["lesionwise_dice"], lost["hd95_mm"], lost["lesions_fn"]) == ("missing", 0, 374, 1)
    scores = {line["scan_id"]: line for line in cohort.table("all_scores.csv")}
    assert [scores[case]["LesionWise_Dice_WT"] for case in "abc"] == ["1.0", repr(1 / 3), "0.0"]
    assert [scores[case]["Num_FN_WT"] for case in "abc"] == ["0", "0", "1"]
    full = {line["scan_id"]: line for line in cohort.table("all_full_scores.csv")}
    assert list(full["a"]) == ["scan_id", "Dice_WT", "Hausdorff95_WT", "Sensitivity_WT", "Specificity_WT"]
    assert float(full["mean"]["Dice_WT"]) == pytest.approx((1 + 32 / 49) / 3)
    assert cohort.summary()["conventions"]["challenge"] == "brats2023-men"


def test_distances_follow_the_spacing_of_the_files(cohort: Cohort):
    # One slice of 3 mm further up; voxels are 2 x 1 x 3 mm.
    cohort.add("a", TUMOUR, np.roll(TUMOUR, 1, axis=2))
    (row,), _ = cohort.evaluate(regions=["WT"], challenge="brats2023-gli")
    assert (row["hd95_mm"], row["lesionwise_hd95_mm"]) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("size", "step", "hd95", "assd", "nsd_1mm", "nsd_2mm"),
    [
        # A voxel has eight surface elements of equal area, on its corners. Two steps of 3 mm up: from the four lower
        # corners it is 6 mm to the other's nearest, from the upper ones 3 mm.
        (1, (0, 0, 2), 6.0, 4.5, 0.0, 0.0),
        # Two steps of 1 mm: 1 and 2 mm.
        (1, (0, 2, 0), 2.0, 1.5, 0.5, 1.0),
        # One step of 2 mm: half of the corners are common.
        (1, (1, 0, 0), 2.0, 1.0, 0.5, 1.0),
        # The same voxel and the one above. Faces are 3, 6 and 2 mm², so a corner's triangle is |(3, 6, 2)| / 8 = 7/8
        # mm², and an element amid the upright edge of the pair 3 hypot(2/2, 1/2) mm². Only the upper four of the
        # pair's corners are off, by 3 mm: 3.5 of its 7 + 13.416 mm², more than a twentieth, and of all 27.416 mm².
        (2, (0, 0, 0), 3.0, 3 * 3.5 / 27.41640786, 1 - 3.5 / 27.41640786, 1 - 3.5 / 27.41640786),
    ],
)
def test_surfaces_on_voxels_of_2_by_1_by_3_mm_by_hand(
    cohort: Cohort, size: int, step: tuple[int, int, int], hd95: float, assd: float, nsd_1mm: float, nsd_2mm: float
):
    # Label 4 is enhancing tumour by the convention of the manifest, so that all three regions are the voxel.
    i, j, k = step
    found = block((4, (4 + i, 4 + j, 1 + k), (5 + i, 5 + j, 1 + k + size)))
    cohort.add("a", block((4, (4, 4, 1), (5, 5, 2))), found, convention="brats2018")
    rows, _ = cohort.evaluate(challenge="brats2023-met")
    assert [row["region"] for row in rows] == ["WT", "TC", "ET"]
    for row in rows:
        assert row["hd95_mm"] == row["legacy_hd95_mm"] == hd95
        assert [row["assd_mm"], row["nsd_1mm"], row["nsd_2mm"]] == pytest.approx([assd, nsd_1mm, nsd_2mm], abs=1e-9)
        volumes = [row[name] for name in ("reference_volume_ml", "prediction_volume_ml", "volume_difference_ml")]
        assert volumes == pytest.approx([0.006, 0.006 * size, 0.006 * (size - 1)], abs=1e-12)
        # 6 mm³ are more than the 2 mm³ of small metastases. One step of dilation reaches the neighbour voxel alone.
        assert (row["lesions_tp"], row["lesions_fn"]) == ((0, 1) if max(step) == 2 else (1, 0))


def test_the_floor_is_scored_as_the_challenge_too(cohort: Cohort):
    cohort.add("a", TUMOUR, TUMOUR)
    boxes_of(cohort.predictions / "prompts.csv", ("a", 1, 1, 1, 5, 5), ("a", 2, 1, 1, 5, 5))
    _, floor = cohort.evaluate(regions=["WT"], challenge="brats2023-gli", workers=2)[0]
    assert (floor["method"], floor["lesionwise_dice"], floor["lesions_tp"]) == ("filled_box", 1.0, 1)
    # The leaderboard tables are of the method alone: one line for the case and five that describe.
    assert len(cohort.table("all_scores.csv")) == 6


def test_an_unknown_challenge_is_refused_before_any_work(cohort: Cohort):
    cohort.add("a", TUMOUR, TUMOUR)
    with pytest.raises(ConfigError, match=r"unknown challenge 'brats2023-mem'.*Did you mean brats2023-me"):
        cohort.evaluate(challenge="brats2023-mem")
    assert not cohort.out.exists()


def test_any_number_of_workers_gives_the_same_files(cohort: Cohort):
    broken_cohort(cohort)
    boxes_of(cohort.predictions / "prompts.csv", ("good", 1, 1, 1, 5, 5))
    names = ("per_case.csv", "summary.csv", "summary.json", "failures.csv")
    cohort.evaluate()
    alone = [(cohort.out / name).read_bytes() for name in names]
    cohort.evaluate(workers=2)
    assert [(cohort.out / name).read_bytes() for name in names] == alone


def test_unusable_input(cohort: Cohort):
    cohort.add("a", None, TUMOUR, split="train")
    with pytest.raises(ManifestError, match="no case has a reference"):
        cohort.evaluate()
    with pytest.raises(ManifestError, match="split 'val'"):
        cohort.evaluate(split="val")
    with pytest.raises(DataError, match="no such folder of predictions"):
        evaluate(cohort.manifest, None, cohort.root / "nowhere", cohort.out)


def test_the_stage_imports_without_torch():
    code = "import sys, medsam_lora.stages.evaluate; print(sorted({'torch', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real_data
def test_real_cases_agree_with_simpleitk(brats_dir: Path, tmp_path: Path):
    sitk = pytest.importorskip("SimpleITK")
    folders = sorted(p for p in brats_dir.iterdir() if p.is_dir())[:2]
    lines, expected = [], {}
    (tmp_path / "preds").mkdir()
    for folder in folders:
        (seg,) = folder.glob("*_seg.nii*")
        image = nib.load(seg)
        reference = np.asarray(image.dataobj).astype(np.uint8)
        # Moved by two voxels and one slice: a prediction with every kind of error.
        prediction = np.roll(reference, (2, 0, 1), axis=(0, 1, 2))
        write_label_map(tmp_path / "preds" / f"{folder.name}.nii.gz", prediction, Geometry(image.shape, image.affine))
        lines.append(
            dict.fromkeys(MANIFEST_COLUMNS, "")
            | {
                "case_id": folder.name,
                "patient_id": folder.name,
                "seg": str(seg.relative_to(brats_dir)),
                "label_convention": "brats2018",
            }
        )
        for region, values in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
            measure = sitk.LabelOverlapMeasuresImageFilter()
            a, b = (sitk.GetImageFromArray(np.isin(m, values).astype(np.uint8)) for m in (reference, prediction))
            measure.Execute(a, b)
            expected[folder.name, region] = (
                measure.GetDiceCoefficient(),
                measure.GetJaccardCoefficient(),
                float(np.isin(reference, values).sum()) / 1000,
            )
    write_table(tmp_path / "m.csv", MANIFEST_COLUMNS, lines)
    rows, outcome = evaluate(tmp_path / "m.csv", brats_dir, tmp_path / "preds", tmp_path / "out", bootstrap=100)
    assert outcome.exit_code == 0
    assert len(rows) == 6
    for row in rows:
        found = (row["dice"], row["iou"], row["reference_volume_ml"])
        assert found == pytest.approx(expected[row["case_id"], row["region"]], rel=1e-12)
        assert 0 < row["dice"] < 1
