"""Every CSV the program writes: its columns, and writing it whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from medsam_lora.errors import MedsamLoraError
from medsam_lora.io.files import write_bytes_atomically

MANIFEST_COLUMNS: Final = (
    "case_id",
    "patient_id",
    "split",
    "t1n",
    "t1c",
    "t2f",
    "t2w",
    "seg",
    "label_convention",
    "sha256",
)
FINDING_COLUMNS: Final = ("case_id", "file", "code", "severity", "detail", "remedy")
VERIFIED_COLUMNS: Final = ("case_id", "file", "sha256", "dtype")
BOX_COLUMNS: Final = ("case_id", "k", "i0", "j0", "i1", "j1")
PER_CASE_COLUMNS: Final = (
    "case_id",
    "patient_id",
    "run",
    "method",
    "region",
    "dice",
    "iou",
    "sensitivity",
    "precision",
    "reference_volume_ml",
    "prediction_volume_ml",
    "n_slices",
    "prompt_source",
    "status",
    "postprocess",
    "volume_difference_ml",
)
CHALLENGE_COLUMNS: Final = (
    "hd95_mm",
    "nsd_1mm",
    "nsd_2mm",
    "assd_mm",
    "specificity",
    "lesionwise_dice",
    "lesionwise_hd95_mm",
    "lesions_tp",
    "lesions_fp",
    "lesions_fn",
    "legacy_dice",
    "legacy_hd95_mm",
    "challenge",
)
"""What ``per_case.csv`` has behind `PER_CASE_COLUMNS` where a challenge was named."""
SUMMARY_COLUMNS: Final = ("method", "region", "n_cases", "dice_mean", "dice_low", "dice_high")
STATISTICS_COLUMNS: Final = (
    "family",
    "n_comparisons",
    "metric",
    "better",
    "region",
    "method",
    "baseline",
    "n_cases",
    "n_patients",
    "n_failed",
    "baseline_n_failed",
    "mean",
    "baseline_mean",
    "median",
    "baseline_median",
    "mean_difference",
    "difference_low",
    "difference_high",
    "median_difference",
    "wilcoxon_statistic",
    "p_value",
    "p_holm",
    "rank_biserial",
    "cohens_dz",
    "wins",
    "ties",
    "losses",
    "verdict",
    "postprocess",
    "baseline_postprocess",
)
PER_PATIENT_COLUMNS: Final = ("patient_id", "method", "region", "n_cases", "n_failed")
"""What ``per_patient.csv`` has before the means of the metrics compared."""

_COST_COLUMNS: Final = ("trainable_parameters", "peak_memory_mib", "train_seconds", "seconds_per_step")
RUN_COLUMNS: Final = (
    *("method", "region", "seed", "n_cases", "dice_mean", "dice_low", "dice_high"),
    *_COST_COLUMNS,
)
"""Of ``runs.csv``: a row per run and region of a comparison."""
SEED_COLUMNS: Final = (
    *("method", "region", "n_seeds", "n_cases", "dice_mean", "dice_low", "dice_high"),
    *("seed_sd", "seed_low", "seed_high"),
    *_COST_COLUMNS,
    "runs",
)
"""Of ``seeds.csv``: a row per setting and region that was run with several seeds."""

STATUSES: Final = ("ok", "missing", "wrong_grid", "wrong_label")


def per_case_columns(challenge: str | None) -> tuple[str, ...]:
    """Columns of ``per_case.csv``, with those of a challenge where one was named."""
    return PER_CASE_COLUMNS if challenge is None else (*PER_CASE_COLUMNS, *CHALLENGE_COLUMNS)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically, in the given column order.

    Floats are written with `repr`, so that reading gives the same number; None becomes an empty cell.

    Raises
    ------
    ValueError
        Where a row has a key that is not a column.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    write_bytes_atomically(path, buffer.getvalue().encode())


def read_table(
    path: Path, required: Sequence[str], error: type[MedsamLoraError] = MedsamLoraError
) -> list[dict[str, str]]:
    """Read a CSV as a list of rows of strings, checking that the required columns are there.

    Raises
    ------
    MedsamLoraError
        Of the type `error`, where the file is missing, not text, or lacks a column.
    """
    if not path.is_file():
        raise error("no such file", path=path, remedy="Check the path.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            absent = [name for name in required if name not in (reader.fieldnames or [])]
            if absent:
                raise error(
                    f"the table lacks the column {', '.join(absent)}",
                    path=path,
                    remedy=f"Its columns must be {','.join(required)}.",
                )
            return [{key: (value or "") for key, value in row.items() if key is not None} for row in reader]
    except (UnicodeDecodeError, csv.Error) as problem:
        raise error(f"not a CSV table ({problem})", path=path, remedy="Save it as UTF-8 CSV.") from problem


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if hasattr(value, "item"):  # numpy scalars print as np.float64(...) under repr
        value = value.item()
    return repr(value) if isinstance(value, float) else value
