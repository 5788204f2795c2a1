"""The stage ``verify``: every fault of every case, in one run and without torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from medsam_lora.errors import ManifestError, MedsamLoraError
from medsam_lora.io.checks import NonFinite, check_case
from medsam_lora.io.discovery import FILE_KEYS, case_sha256
from medsam_lora.io.examine import MAX_BYTES
from medsam_lora.io.files import sha256_of
from medsam_lora.io.findings import finding
from medsam_lora.io.manifest import case_path, parse_manifest, table_findings
from medsam_lora.io.partial import VERIFIED_FILE, VerifiedFile, write_verified
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.progress import track
from medsam_lora.records import CaseRecord, Finding

J = TypeVar("J")
R = TypeVar("R")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One case to check: everything a worker process needs."""

    record: CaseRecord
    root: Path
    max_bytes: int
    nonfinite: NonFinite


@dataclass(frozen=True)
class Checked:
    """What checking one case found.

    Parameters
    ----------
    findings : tuple of Finding
    digests : dict of str to str
        Key of a file to its SHA-256, for the files that are there.
    blank : frozenset of str
        Keys of the files that hold only zeros.
    dtypes : mapping of str to str
        Key of a file to the type that its voxels are held in, for the files that could be read.
    """

    findings: tuple[Finding, ...]
    digests: dict[str, str]
    blank: frozenset[str] = frozenset()
    dtypes: Mapping[str, str] = field(default_factory=dict)


def verify(
    manifest: Path,
    root: Path | None = None,
    out: Path | None = None,
    *,
    workers: int | None = 1,
    max_bytes: int = MAX_BYTES,
    nonfinite: NonFinite = "reject",
) -> list[Finding]:
    """Find every fault of every case of a manifest.

    Parameters
    ----------
    manifest : Path
    root : Path, optional
        Data root; by default the manifest's folder.
    out : Path, optional
        Where to write the findings as CSV, its header alone where there are none; beside it ``verified.csv`` notes the
        SHA-256 of the files of faultless cases, which `prepare` then need not read to their ends.
    workers : int, optional
        Processes; None is one per CPU core. The findings do not depend on it.
    max_bytes : int
        Cap on the bytes a header may claim, before anything is loaded.
    nonfinite : {"reject", "zero"}
        Whether NaN and infinite voxels are errors or, as they will be read as 0, warnings.

    Returns
    -------
    list of Finding
        Sorted by case, file, code and detail; the codes are those of `io.findings.SEVERITIES`.

    Raises
    ------
    ManifestError
        Where the manifest cannot be read as a table (all bad lines are named), or there is no data root.
    """
    keep_freed_memory()
    records = [record for _, record in parse_manifest(manifest)]
    base = manifest.parent if root is None else root
    if not base.is_dir():
        raise ManifestError("no such data root", path=base, remedy="Give the folder of the files with --root.")
    jobs = [Job(record, base, max_bytes, nonfinite) for record in records]
    results = list(track(_checked(jobs, workers), "verify", total=len(jobs)))
    found = table_findings(records)
    for result in results:
        found += result.findings
    found += _duplicate_files(records, results)
    found.sort(key=lambda f: (f.case_id, f.file, f.code, f.detail))
    if out is not None:
        write_table(out, FINDING_COLUMNS, [vars(f) for f in found])
        write_verified(out.with_name(VERIFIED_FILE), _verified(records, results))
    return found


def check(job: Job) -> Checked:
    """Check one case; whatever happens becomes a finding."""
    record = job.record
    try:
        digests = _digests(job)
        case = check_case(record, job.root, max_bytes=job.max_bytes, nonfinite=job.nonfinite)
        findings = [*case.findings, *_changed(record, digests)]
        dtypes = {key: str(volume.array.dtype) for key, volume in case.volumes.items()}
        return Checked(tuple(findings), digests, frozenset(case.blank), dtypes)
    except Exception as error:  # one case must not stop the others, and is reported
        _log.debug("case %s", record.case_id, exc_info=True)
        return _failed(job, f"{type(error).__name__}: {error}")


def _verified(records: Sequence[CaseRecord], results: Sequence[Checked]) -> Iterator[tuple[str, str, VerifiedFile]]:
    """The files of the cases that read whole and without an error, or voxels that are not numbers."""
    for record, result in zip(records, results, strict=True):
        if any(f.severity == "error" or f.code == "nonfinite" for f in result.findings):
            continue
        for key, file in record.files.items():
            if key in result.digests and key in result.dtypes:
                yield record.case_id, file, VerifiedFile(result.digests[key], result.dtypes[key])


def _checked(jobs: Sequence[Job], workers: int | None) -> Iterator[Checked]:
    wanted = min(workers or os.cpu_count() or 1, len(jobs))
    if wanted <= 1:
        yield from map(check, jobs)
        return
    for job, result in zip(jobs, in_processes(check, jobs, wanted), strict=True):
        yield _failed(job, "the process that checked it was killed") if result is None else result


def in_processes(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[R | None]:
    """Results of a function over jobs, in their order, from worker processes.

    A process that dies takes its whole pool along; the jobs without a result are then run each in a process of its
    own, and the one that kills it gives None.

    Parameters
    ----------
    function : callable
        Importable by name, as its argument and result must be picklable.
    jobs : sequence
    workers : int

    Yields
    ------
    result or None
    """
    # Processes are spawned, not forked: a fork copies locks that threads of the parent may hold.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=keep_freed_memory) as pool:
        futures = _submitted(pool, function, jobs)
        for job, future in zip(jobs, futures, strict=True):
            try:
                if future is None:
                    raise BrokenProcessPool
                yield future.result()
            except BrokenProcessPool:
                with ProcessPoolExecutor(1, mp_context=context, initializer=keep_freed_memory) as alone:
                    try:
                        yield alone.submit(function, job).result()
                    except BrokenProcessPool:
                        yield None


def _submitted(pool: ProcessPoolExecutor, function: Callable[[J], R], jobs: Iterable[J]) -> list[Future[R] | None]:
    futures: list[Future[R] | None] = []
    for job in jobs:
        try:
            futures.append(pool.submit(function, job))
        except BrokenProcessPool:  # it broke while jobs were still being handed in
            futures.append(None)
    return futures


def _digests(job: Job) -> dict[str, str]:
    digests = {}
    for key in FILE_KEYS:
        if not job.record.files.get(key):
            continue
        try:
            path = case_path(job.record, key, job.root)
            if path.is_file():
                digests[key] = sha256_of(path)
        except (MedsamLoraError, OSError):
            continue  # check_case says what is wrong with it
    return digests


def _changed(record: CaseRecord, digests: dict[str, str]) -> list[Finding]:
    """Whether the files are those that the manifest was written for; an empty hash promises nothing."""
    complete = all(key in digests for key, file in record.files.items() if file)
    if not record.sha256 or not complete or case_sha256(digests) == record.sha256:
        return []
    detail = "the files of the case have changed since the manifest was written"
    remedy = "Restore them; or, where the change is meant, build the manifest again."
    return [finding("hash_mismatch", record.case_id, detail, remedy)]


def _failed(job: Job, detail: str) -> Checked:
    remedy = "Check the files of this case; the others are checked. Report this with the file where it can be shared."
    return Checked((finding("check_failed", job.record.case_id, detail, remedy),), {})


def _duplicate_files(records: Sequence[CaseRecord], results: Sequence[Checked]) -> list[Finding]:
    """Files with the same bytes, in one case or in several."""
    places: dict[str, list[tuple[CaseRecord, str]]] = {}
    for record, result in zip(records, results, strict=True):
        for key, digest in result.digests.items():
            # Two blank files are equal without being copies, such as the references of two healthy cases.
            if key not in result.blank:
                places.setdefault(digest, []).append((record, key))
    found = []
    for copies in places.values():
        for record, key in copies:
            others = [f"{r.case_id} {k}" for r, k in copies if (r.case_id, k) != (record.case_id, key)]
            if others:
                detail = f"{key} has the same content as {', '.join(others)}"
                remedy = "Find out whose it is, and remove it from the other."
                found.append(finding("duplicate_file", record.case_id, detail, remedy, file=record.files[key]))
    return found
