"""Work on one case after another, or on several in processes; a failure is a finding of its case."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from medsam_lora.errors import MedsamLoraError
from medsam_lora.geometry import Geometry
from medsam_lora.io.case import read_case
from medsam_lora.io.partial import Verified, read_planes
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.progress import track
from medsam_lora.records import CaseRecord, CaseVolumes, Finding
from medsam_lora.transforms.stages import PreparePlan, planes_needed

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One case to be worked on, with all that a worker process needs."""

    record: CaseRecord
    root: Path
    plan: PreparePlan
    store: Path
    max_bytes: int
    verified: Verified = field(default_factory=dict)

    def read(self) -> CaseVolumes:
        """The case's volumes on the native grid, whole."""
        return read_case(
            self.record, self.root, self.plan.modalities, max_bytes=self.max_bytes, nonfinite=self.plan.nonfinite
        )

    def read_chosen(self) -> CaseVolumes:
        """As `read`, but only the planes that will be stored, where these can be known beforehand."""
        if self.plan.scope != "slice":  # statistics over the volume: before anything is read
            return self.read()

        def choose(label_map: np.ndarray, geometry: Geometry) -> list[int] | None:
            return planes_needed(label_map, geometry, self.plan, self.record)

        chosen = read_planes(
            self.record, self.root, self.plan.modalities, self.verified, choose, max_bytes=self.max_bytes
        )
        return self.read() if chosen is None else chosen


def each(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, description: str
) -> Iterator[tuple[Job, Result | Finding]]:
    """Do some work on every case, in processes where more than one is asked for; failures come back as findings."""
    guarded = partial(_guarded, work)
    if workers <= 1 or len(jobs) <= 1:
        yield from track(((job, guarded(job)) for job in jobs), description, len(jobs))
        return
    # Spawned, not forked: the parent may hold a model and its threads.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("spawn"), initializer=_begin_worker
    )
    try:
        futures = {pool.submit(guarded, job): job for job in jobs}
        for future in track(concurrent.futures.as_completed(futures), description, len(jobs)):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], _finding(futures[future], "a worker process died", _FEWER_WORKERS, "worker_died")
    finally:
        # On Ctrl-C the cases begun are finished, the others not begun.
        pool.shutdown(wait=True, cancel_futures=True)


_FEWER_WORKERS = "Free memory and disk space, or run with fewer --workers; what is done is kept."


def _guarded(work: Callable[[Job], Result], job: Job) -> Result | Finding:
    try:
        return work(job)
    except MedsamLoraError as error:
        finding = _finding(job, error.message, error.remedy or "", error.code or "prepare_failed", error.path)
    except (OSError, MemoryError) as error:
        finding = _finding(job, f"{type(error).__name__}: {error}", _FEWER_WORKERS, "prepare_failed")
    logger.error("case %s: %s. %s", finding.case_id, finding.detail, finding.remedy)
    return finding


def _finding(job: Job, detail: str, remedy: str, code: str, path: Path | None = None) -> Finding:
    file = "" if path is None else str(path)
    if path is not None and path.is_relative_to(job.root):
        file = str(path.relative_to(job.root))
    return Finding(job.record.case_id, file, code, "error", detail, remedy)


def _begin_worker() -> None:
    # Interrupts are left to the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
