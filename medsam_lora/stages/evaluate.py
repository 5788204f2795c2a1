"""Scoring of predictions: whole volumes, on the native grid, against the original label files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from medsam_lora import labels
from medsam_lora.analysis.challenge_tables import FULL_SCORES, LESION_SCORES, challenge_table
from medsam_lora.analysis.statistics import summarise
from medsam_lora.config import nearest
from medsam_lora.errors import ConfigError, ManifestError, MedsamLoraError
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.predictions import PROMPTS_NAME, PredictionRecord, predicted_cases, read_record
from medsam_lora.io.tables import FINDING_COLUMNS, SUMMARY_COLUMNS, per_case_columns, write_table
from medsam_lora.metrics import WORST_DISTANCE_MM
from medsam_lora.metrics.lesionwise import CHALLENGES
from medsam_lora.metrics.per_case import nnunet_means
from medsam_lora.progress import track
from medsam_lora.prompts import BOX_TABLE
from medsam_lora.prompts.sources import read_box_table
from medsam_lora.records import CaseRecord, Finding, SliceBox, StageOutcome
from medsam_lora.stages.record import write_json
from medsam_lora.stages.scoring import CaseScores, Job, score_case


def evaluate(
    manifest: Path,
    root: Path | None,
    predictions: Path,
    out: Path,
    *,
    run: str | None = None,
    method: str | None = None,
    split: str | None = None,
    regions: Sequence[str] | None = None,
    boxes: Path | None = None,
    challenge: str | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    workers: int = 1,
) -> tuple[list[dict[str, Any]], StageOutcome]:
    """Score a folder of predictions.

    Parameters
    ----------
    manifest : Path
    root : Path or None
        Data root; the manifest's folder by default.
    predictions : Path
        Folder with ``<case_id>.nii.gz`` and, where this program made it, ``record.json`` and ``prompts.csv``.
    out : Path
        Receives ``per_case.csv``, ``summary.csv``, ``summary.json`` and ``failures.csv``.
    run, method : str, optional
        Put over what the record says; without a record, the folder's name.
    split : str, optional
        Score this split; by default the cases the record lists, without such a list every case of the manifest.
    regions : sequence of str, optional
        Score these only. Regions that the model was not trained for are refused.
    boxes : Path, optional
        Box prompts (`io.tables.BOX_COLUMNS`) for the floor; the folder's ``prompts.csv`` by default.
    challenge : str, optional
        A key of `metrics.lesionwise.CHALLENGES`: adds `io.tables.CHALLENGE_COLUMNS` to ``per_case.csv``, and writes
        ``all_scores.csv`` and ``all_full_scores.csv`` as the challenge does.
    bootstrap, seed : int
        Resamples and seed of the intervals in ``summary.csv``.
    workers : int
        Processes; the results do not depend on it.

    Returns
    -------
    rows : list of dict
        Those of ``per_case.csv``: the method's, then the floor's.
    outcome : StageOutcome
        `failed` holds cases without a usable prediction or reference; `skipped` those without a reference file.

    Raises
    ------
    ConfigError, ManifestError, DataError
        Where nothing can be scored: unusable arguments, manifest, folder, record or box table.
    """
    _check_challenge(challenge)
    records = read_manifest(manifest)
    stored = read_record(predictions)
    record = replace(stored, run=run or stored.run, method=method or stored.method)
    wanted = _wanted_regions(regions, record)
    chosen, findings = _choose(records, record, split, manifest)
    findings += _strangers(predictions, records)
    table, floor_source = _box_table(predictions, boxes, record)
    outcome, jobs = StageOutcome(), []
    for case in chosen:
        scored = tuple(region for region in wanted if region in labels.regions_of(case.label_convention))
        if "seg" not in case.files or not scored:
            findings.append(_unscored(case, wanted))
            outcome.skipped.append(case.case_id)
            continue
        mine = None if table is None else tuple(table.get(case.case_id, ()))
        base = manifest.parent if root is None else root
        jobs.append(Job(case, base, predictions, record, scored, mine, floor_source, challenge))
    if not jobs:
        raise ManifestError("no case has a reference to score against", path=manifest, remedy="Fill the column seg.")
    results = list(_run(jobs, workers))
    findings += [finding for result in results for finding in result.findings]
    outcome.done = [job.case.case_id for job, result in zip(jobs, results, strict=True) if not result.findings]
    outcome.failed = [finding for finding in findings if finding.severity == "error"]
    # The floor comes after the method, whose rows most readers want first.
    rows = [row for result in results for row in result.rows] + [row for r in results for row in r.floor_rows]
    write_table(out / "per_case.csv", per_case_columns(challenge), rows)
    if challenge is not None:
        own = [row for result in results for row in result.rows]
        write_table(out / "all_scores.csv", *challenge_table(own, LESION_SCORES))
        write_table(out / "all_full_scores.csv", *challenge_table(own, FULL_SCORES))
    write_table(out / "summary.csv", SUMMARY_COLUMNS, summarise(rows, bootstrap, seed))
    write_table(out / "failures.csv", FINDING_COLUMNS, [vars(finding) for finding in findings])
    write_json(out / "summary.json", _summary([r.entry for r in results if r.entry is not None], record, challenge))
    return rows, outcome


def _run(jobs: Sequence[Job], workers: int) -> Iterator[CaseScores]:
    if workers <= 1 or len(jobs) == 1:
        yield from track(map(score_case, jobs), "evaluate", len(jobs))
        return
    # Fresh interpreters: a fork of a process that runs torch's threads can hang.
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        try:
            yield from track(pool.map(score_case, jobs), "evaluate", len(jobs))
        except BrokenProcessPool as error:
            raise MedsamLoraError(
                "a worker process was killed, most likely for want of memory", remedy="Use fewer --workers."
            ) from error


def _check_challenge(name: str | None) -> None:
    if name is not None and name not in CHALLENGES:
        guess = nearest(name.lower(), list(CHALLENGES))
        hint = f"Did you mean {guess}?" if guess else f"Known: {', '.join(CHALLENGES)}."
        raise ConfigError(f"unknown challenge {name!r}", remedy=hint)


def _wanted_regions(given: Sequence[str] | None, record: PredictionRecord) -> tuple[str, ...]:
    trained = record.regions or tuple(labels.REGIONS)
    if given is None:
        return trained
    for region in given:
        if region not in labels.REGIONS:
            guess = nearest(region.upper(), list(labels.REGIONS))
            hint = f"Did you mean {guess}?" if guess else f"Known: {', '.join(labels.REGIONS)}."
            raise ConfigError(f"unknown region {region!r}", remedy=hint)
        if region not in trained:
            raise ConfigError(
                f"the model was not trained for the region {region}", remedy=f"Score {', '.join(trained)} only."
            )
    if not given:
        raise ConfigError("no region to score", remedy=f"Choose among {', '.join(trained)}.")
    return tuple(region for region in labels.REGIONS if region in given)


def _choose(
    records: Sequence[CaseRecord], record: PredictionRecord, split: str | None, manifest: Path
) -> tuple[list[CaseRecord], list[Finding]]:
    """The cases to score; every case that was asked for stays in, predicted or not."""
    findings = []
    chosen = list(records)
    if split is not None:
        chosen = [case for case in records if case.split == split]
    elif record.cases is not None:
        by_id = {case.case_id: case for case in records}
        chosen = [by_id[case_id] for case_id in record.cases if case_id in by_id]
        for case_id in record.cases:
            if case_id not in by_id:
                detail = "the run predicted this case, but the manifest does not list it"
                remedy = "Evaluate with the manifest that was predicted."
                findings.append(Finding(case_id, "", "unknown_case", "error", detail, remedy))
    if not chosen:
        what = "of the run record" if split is None else f"in the split {split!r}"
        raise ManifestError(f"the manifest has no case {what}", path=manifest, remedy="Choose another split.")
    return chosen, findings


def _strangers(folder: Path, records: Sequence[CaseRecord]) -> list[Finding]:
    known = {case.case_id for case in records}
    detail = "no case of the manifest has this name, so the file is not scored"
    remedy = "Name predictions <case_id>.nii.gz."
    return [
        Finding(case_id, path.name, "unknown_prediction", "warning", detail, remedy)
        for case_id, path in predicted_cases(folder).items()
        if case_id not in known
    ]


def _box_table(
    folder: Path, boxes: Path | None, record: PredictionRecord
) -> tuple[Mapping[str, Sequence[SliceBox]] | None, str]:
    if boxes is not None:
        return read_box_table(boxes), BOX_TABLE
    own = folder / PROMPTS_NAME
    return (read_box_table(own) if own.is_file() else None), record.prompt_source


def _unscored(case: CaseRecord, wanted: Sequence[str]) -> Finding:
    if "seg" not in case.files:
        detail, remedy = "the case has no reference, so it is not scored", "Fill the column seg of the manifest."
        return Finding(case.case_id, "", "missing_reference", "warning", detail, remedy)
    detail = f"a reference of the convention {case.label_convention!r} cannot score {', '.join(wanted)}"
    return Finding(case.case_id, case.files["seg"], "missing_reference", "warning", detail, "Score the region WT.")


def _summary(entries: Sequence[Mapping[str, Any]], record: PredictionRecord, challenge: str | None) -> dict[str, Any]:
    mean, foreground = nnunet_means([entry["metrics"] for entry in entries])
    left_out = {
        region: sum(region in e["metrics"] and math.isnan(e["metrics"][region]["Dice"]) for e in entries)
        for region in mean
    }
    return {
        "foreground_mean": foreground,
        "mean": mean,
        "metric_per_case": list(entries),
        "conventions": {
            "run": record.run,
            "method": record.method,
            "prompt_source": record.prompt_source,
            "scores": "overlap of whole volumes on the native grid, never averaged over slices",
            "regions": {region: list(labels.REGIONS[region]) for region in mean},
            "n_cases": len(entries),
            "n_failed": sum(entry["status"] != "ok" for entry in entries),
            "failed_cases": "a missing or unusable prediction counts with Dice and IoU 0, as an empty one",
            "both_empty": "NaN here and left out of the means of Dice and IoU; 1 in per_case.csv and summary.csv",
            "both_empty_left_out": left_out,
            "one_empty": f"Dice and IoU 0 (distances {WORST_DISTANCE_MM:g} mm)",
            **({} if challenge is None else {"challenge": challenge}),
        },
    }
