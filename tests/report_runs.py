"""A pipeline's folder as `medsam-lora run` leaves it, with predictions made by hand instead of by a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion

from medsam_lora.analysis.statistics import summarise
from medsam_lora.io.case import read_case
from medsam_lora.io.files import sha256_of
from medsam_lora.io.manifest import write_manifest
from medsam_lora.io.nifti import write_label_map
from medsam_lora.io.tables import SUMMARY_COLUMNS, per_case_columns, write_table
from medsam_lora.labels import REGIONS, label_map_of, region_mask
from medsam_lora.prompts.sources import reference_boxes, write_box_table
from medsam_lora.records import CaseRecord
from medsam_lora.stages.evaluate import evaluate
from medsam_lora.stages.scoring import FLOOR

Predict = Callable[[np.ndarray], np.ndarray]


def blunt(label_map: np.ndarray) -> np.ndarray:
    """Every region a voxel too large: what a model does that fills its box."""
    return _changed(label_map, lambda mask: binary_dilation(mask, iterations=2))


def close(label_map: np.ndarray) -> np.ndarray:
    """The reference without the outermost voxels of every region."""
    return _changed(label_map, lambda mask: binary_erosion(mask, iterations=1))


def make_runs(
    out: Path,
    root: Path,
    records: Sequence[CaseRecord],
    methods: Mapping[str, Predict],
    challenge: str | None = None,
    missing: tuple[str, str] | None = None,
) -> Path:
    """Write ``out`` as a pipeline would.

    Parameters
    ----------
    out : Path
    root : Path
        Of the cases.
    records : sequence of CaseRecord
        All of them are test cases.
    methods : mapping of str to callable
        From the canonical reference to a label map.
    challenge : str, optional
    missing : (str, str), optional
        A method and a case that it has no prediction of.
    """
    write_manifest(out / "manifest.csv", records)
    tables = {}
    for label, predict in methods.items():
        folder = out / "runs" / label
        boxes = {}
        for record in records:
            case = read_case(record, root)
            assert case.label_map is not None
            boxes[record.case_id] = reference_boxes(case.label_map, case.geometry, "WT", "union", 1)
            if missing != (label, record.case_id):
                path = folder / "predictions" / f"{record.case_id}.nii.gz"
                write_label_map(path, predict(case.label_map), case.geometry)
        write_box_table(folder / "predictions" / "prompts.csv", boxes)
        _write_records(out, root, records, label)
        rows, _ = evaluate(
            out / "manifest.csv", root, folder / "predictions", folder / "evaluation", challenge=challenge, bootstrap=50
        )
        tables.setdefault(FLOOR, [r for r in rows if r["method"] == FLOOR])
        tables[label] = [r for r in rows if r["method"] != FLOOR]
        write_table(folder / "log.csv", LOG, [_epoch(e, label) for e in range(6)] if label != "zero_shot" else [])
    for label, rows in tables.items():
        write_table(out / "runs" / label / "per_case.csv", per_case_columns(challenge), rows)
    everything = [row for rows in tables.values() for row in rows]
    write_table(out / "summary.csv", SUMMARY_COLUMNS, summarise(everything, 50))
    return out


LOG = ("epoch", "loss", "loss_dice", "loss_bce", "train_dice", "val_dice", "duration_s")


def _epoch(epoch: int, label: str) -> dict[str, float | int]:
    if epoch == 0:
        return {"epoch": 0, "val_dice": 0.61}
    gain = 1 - 0.6**epoch
    offset = len(label) / 200
    return {
        "epoch": epoch,
        "loss": 0.9 - 0.6 * gain,
        "loss_dice": 0.6 - 0.4 * gain,
        "loss_bce": 0.3 - 0.2 * gain,
        "train_dice": 0.6 + 0.3 * gain - offset,
        "val_dice": 0.61 + 0.25 * gain - offset,
        "duration_s": 4.5,
    }


def _write_records(out: Path, root: Path, records: Sequence[CaseRecord], label: str) -> None:
    about = {
        "medsam_lora": "0.1.0",
        "command": ["medsam-lora", "run", "phantom.yaml", "--set", "train.note=<b>bold</b>"],
        "written_at": "2026-11-25T04:00:00+00:00",
        "python": "3.11.7",
        "platform": "Linux",
        "packages": {"torch": "2.13.0", "monai": "1.6.1"},
        "method": label,
        "prompt_source": "reference_box",
        "regions": list(REGIONS),
        "device": "cpu",
        "base_sha256": "ab" * 32,
        "duration_s": 25.25,
        "peak_memory_mib": 710.5,
    }
    folder = out / "runs" / label
    config = {"train": {"seed": 3}, "method": {"name": label, "rank": 8}}
    training = about | {"stage": "train", "config": config, "trainable_parameters": 793204, "n_train_cases": 14}
    training |= {"reload_check": {"largest_difference": 0.0}, "store": "9f0187a7af21"}
    (folder / "run.json").write_text(json.dumps(training))
    (folder / "config.yaml").write_text(f"method:\n  name: {label}\n  rank: 8\n")
    prediction = about | {
        "stage": "predict",
        "run": label,
        "labels": {"1": "NETC", "2": "SNFH", "3": "ET"},
        "manifest": str(out / "manifest.csv"),
        "root": str(root),
        "cases": [record.case_id for record in records],
        "adapter_sha256": sha256_of(out / "manifest.csv"),
        "postprocess": "none",
    }
    (folder / "predictions" / "record.json").write_text(json.dumps(prediction))


def _changed(label_map: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    masks = np.stack([change(region_mask(label_map, region)) for region in REGIONS])
    return label_map_of(masks, list(REGIONS))[0]
