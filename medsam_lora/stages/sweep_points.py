"""One point of a sweep: run once, whatever becomes of it recorded, and the table of all points kept up to date."""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from medsam_lora.errors import MedsamLoraError, PreparedError
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.tables import write_table
from medsam_lora.stages.method_runs import store_for, train_and_predict
from medsam_lora.stages.pipeline import Method
from medsam_lora.stages.record import write_json
from medsam_lora.stages.summary import score_method, write_scores
from medsam_lora.stages.sweep_file import Point, Sweep
from medsam_lora.stages.sweep_table import DONE, FAILED, INCOMPLETE, PENDING, table_rows
from medsam_lora.stages.workplace import Workplace

logger = logging.getLogger(__name__)

POINT_FILE: Final = "point.json"
TRACEBACK_FILE: Final = "error.txt"


def run_point(place: Workplace, point: Point) -> str:
    """Prepare, train, predict and score one point; a fault is recorded and ends this point alone.

    Parameters
    ----------
    place : Workplace
        Gains the cases that failed.
    point : Point

    Returns
    -------
    str
        ``done``, ``failed``, or ``incomplete`` where some cases failed; as in ``point.json``.
    """
    folder = place.run_folder(point.method, "")
    inputs = _inputs(place, point.method)
    if state_of(place.out, point.label, inputs) == DONE:
        logger.info("%s is done already", point.label)
        return DONE
    record: dict[str, Any] = {
        "point": point.label,
        "values": dict(point.values),
        "split": place.split,
        "inputs": inputs,
    }
    before = len(place.failures)
    (folder / TRACEBACK_FILE).unlink(missing_ok=True)
    try:
        for fold, manifest in place.fold_manifests():
            train_and_predict(place, point.method, fold, manifest, _store(place, point.method, fold, manifest))
        rows, floor = score_method(place, point.method)
        write_scores(place, point.label, [*rows, *floor])
        status, error = INCOMPLETE if len(place.failures) > before else DONE, ""
    except Exception as fault:  # whatever it is, the other points do not depend on it; all of it is kept
        status, error = FAILED, str(fault) if isinstance(fault, MedsamLoraError) else f"{type(fault).__name__}: {fault}"
        logger.error("point %s failed: %s", point.label, error)
        write_bytes_atomically(folder / TRACEBACK_FILE, traceback.format_exc().encode())
    write_json(folder / POINT_FILE, record | {"status": status, "error": error})
    return status


def state_of(out: Path, label: str, inputs: str | None = None) -> str:
    """What is known of a point: its status, or ``pending`` where there is none, or of other inputs."""
    record = read_point(out, label)
    known = inputs is None or record.get("inputs") == inputs
    scored = (out / "runs" / label / "per_case.csv").is_file()
    status = str(record.get("status", PENDING))
    return status if known and (scored or status == FAILED) else PENDING


def read_point(out: Path, label: str) -> dict[str, Any]:
    """``point.json`` of a point; empty where there is none."""
    path = out / "runs" / label / POINT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_sweep_table(place: Workplace, sweep: Sweep, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Write ``sweep.csv``: a row per point, whatever became of it.

    Parameters
    ----------
    place : Workplace
    sweep : Sweep
    points : sequence of Point

    Returns
    -------
    list of dict
        The rows.
    """
    states = {p.label: state_of(place.out, p.label, _inputs(place, p.method)) for p in points}
    errors = {
        p.label: str(read_point(place.out, p.label).get("error", "")) for p in points if states[p.label] == FAILED
    }
    base = place.pipeline.base.evaluate
    columns, rows = table_rows(place.out, sweep, points, states, errors, base.bootstrap, base.seed)
    write_table(place.out / "sweep.csv", columns, rows)
    return rows


def _store(place: Workplace, method: Method, fold: str, manifest: Path) -> Path:
    """The store of a point. All of its cases have to be in it: points on other cases could not be compared."""
    store, failed = store_for(place, method, fold, manifest)
    if failed:
        first = failed[0]
        raise PreparedError(
            f"{len(failed)} cases cannot be prepared with these settings, the first: {first.detail}",
            case_id=first.case_id,
            path=first.file or None,
            remedy=f"{first.remedy} Or take the case out of the manifest: all points need the same cases.",
        )
    return store


def _inputs(place: Workplace, method: Method) -> str:
    """A hash of what decides the scores of a point."""
    facts = {
        "config": method.config.model_dump(mode="json", exclude={"train": {"cache_gib", "processes"}}),
        "split": place.split,
        "manifests": [sha256_of(manifest) for _, manifest in place.fold_manifests()],
        "challenge": place.pipeline.base.evaluate.challenge,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
