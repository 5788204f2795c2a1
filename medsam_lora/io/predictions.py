"""A folder of predictions: what made them, what their labels mean, and where the file of a case is.

A folder of this program holds ``<case_id>.nii.gz`` per case, ``record.json`` and ``prompts.csv``. A folder of
another program needs the label maps only: without a record they are read by the label convention of the case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsam_lora import labels
from medsam_lora.errors import DataError

RECORD_NAME = "record.json"
PROMPTS_NAME = "prompts.csv"
UNKNOWN_PROMPT = "unknown"

_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class PredictionRecord:
    """What ``record.json`` says of a folder of predictions.

    Parameters
    ----------
    run, method, prompt_source : str
    regions : tuple of str, or None
        Regions the model was trained for; None where that is unknown.
    meanings : mapping of int to str, or None
        Voxel value to a key of `labels.REGIONS` or `labels.LABELS`; None for the case's label convention.
    cases : tuple of str, or None
        Ids that a prediction was asked for, the failed ones among them.
    postprocess : str
        What was done to the masks after the model, in words; ``none`` for nothing, as of other programs.
    """

    run: str
    method: str
    prompt_source: str
    regions: tuple[str, ...] | None
    meanings: Mapping[int, str] | None
    cases: tuple[str, ...] | None
    postprocess: str = "none"


def read_record(folder: Path) -> PredictionRecord:
    """Read a folder's record; without one, run and method are the folder's name.

    Raises
    ------
    DataError
        Where there is no such folder, or the record is not what this program writes.
    """
    if not folder.is_dir():
        raise DataError("no such folder of predictions", path=folder, remedy="Check --predictions.")
    path, name = folder / RECORD_NAME, folder.resolve().name
    if not path.is_file():
        return PredictionRecord(name, name, UNKNOWN_PROMPT, None, None, None)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _parse(data, name)
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        raise DataError(
            f"not a usable run record ({error})", path=path, remedy="Predict again, or correct the record."
        ) from error


def prediction_path(folder: Path, case_id: str) -> Path | None:
    """The prediction of a case, ``.nii.gz`` before ``.nii``, or None where there is none."""
    return next((path for suffix in _SUFFIXES if (path := folder / f"{case_id}{suffix}").is_file()), None)


def predicted_cases(folder: Path) -> dict[str, Path]:
    """Every label map in the folder by the case id its name gives."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), None)
        if suffix and path.is_file():
            found.setdefault(path.name.removesuffix(suffix), path)
    return found


def meanings_for(record: PredictionRecord, convention: str) -> dict[int, frozenset[int]]:
    """The canonical labels that every voxel value of a prediction stands for.

    Parameters
    ----------
    record : PredictionRecord
    convention : str
        The case's label convention, used where the record has no labels.

    Examples
    --------
    >>> meanings_for(PredictionRecord("r", "m", "p", None, None, None), "brats2018")[4]
    frozenset({3})
    """
    if record.meanings is None:
        return {value: frozenset({label}) for value, label in labels.CONVENTIONS[convention].items()}
    return {value: labels.meaning_of(name) for value, name in record.meanings.items()}


def predicted_mask(label_map: np.ndarray, region: str, meanings: Mapping[int, frozenset[int]]) -> np.ndarray:
    """Mask of a region in a prediction: the voxels whose value lies wholly within the region.

    Parameters
    ----------
    label_map : ndarray of integer, any shape
    region : str
    meanings : mapping of int to frozenset of int
        From `meanings_for`.

    Returns
    -------
    ndarray of bool, same shape

    Examples
    --------
    >>> nested = {1: labels.meaning_of("WT"), 2: labels.meaning_of("TC")}
    >>> [predicted_mask(np.array([0, 1, 2]), region, nested).tolist() for region in ("WT", "TC")]
    [[False, True, True], [False, False, True]]
    """
    mask = np.zeros(label_map.shape, bool)
    for value, canonical in meanings.items():
        if canonical <= set(labels.REGIONS[region]):
            mask |= label_map == value
    return mask


def _parse(data: Any, name: str) -> PredictionRecord:
    if not isinstance(data, dict):
        raise ValueError("it must hold an object with keys")
    texts = {"run": name, "method": name, "prompt_source": UNKNOWN_PROMPT, "postprocess": "none"}
    for key in texts:
        if key in data:
            if not isinstance(data[key], str) or not data[key]:
                raise ValueError(f"{key} must be text")
            texts[key] = data[key]
    regions, meanings = _parse_regions(data.get("regions")), _parse_meanings(data.get("labels"))
    if regions and meanings:
        for region in regions:
            if not any(labels.meaning_of(m) <= set(labels.REGIONS[region]) for m in meanings.values()):
                raise ValueError(f"no label means a part of the region {region}")
    return PredictionRecord(**texts, regions=regions, meanings=meanings, cases=_parse_texts(data, "cases"))


def _parse_regions(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not given or not set(map(str, given)) <= set(labels.REGIONS):
        raise ValueError(f"regions must be a list of {', '.join(labels.REGIONS)}")
    return tuple(region for region in labels.REGIONS if region in given)


def _parse_meanings(given: Any) -> dict[int, str] | None:
    if given is None:
        return None
    known = {*labels.REGIONS, *labels.LABELS}
    if not isinstance(given, dict) or not given or not set(map(str, given.values())) <= known:
        raise ValueError(f"labels must map voxel values to {', '.join(sorted(known))}")
    meanings = {int(value): meaning for value, meaning in given.items()}
    if not all(1 <= value <= 255 for value in meanings):
        raise ValueError("labels must lie between 1 and 255")
    return meanings


def _parse_texts(data: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    if data.get(key) is None:
        return None
    if not isinstance(data[key], list) or not all(isinstance(item, str) for item in data[key]):
        raise ValueError(f"{key} must be a list of texts")
    return tuple(data[key])
