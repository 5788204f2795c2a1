"""The folder of one pipeline run, and what its stages know of each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medsam_lora.errors import ManifestError
from medsam_lora.io.manifest import read_manifest
from medsam_lora.records import Finding
from medsam_lora.stages.pipeline import STAGES, Method, Pipeline


@dataclass
class Workplace:
    """The folder of one pipeline run, and what its stages leave for each other.

    `split` is the one that is predicted and scored; `stores` are those made in this session, by their
    settings, each with the cases that could not be prepared; `jobs` runs are under way at a time.
    """

    out: Path
    pipeline: Pipeline
    root: Path
    device: str
    workers: int
    start: str | None = None
    split: str = "test"
    jobs: int = 1
    failures: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    stores: dict[str, tuple[Path, Sequence[Finding]]] = field(default_factory=dict)

    def runs(self, stage: str) -> bool:
        """Whether a stage is asked for and not before ``--from``."""
        late_enough = self.start is None or STAGES.index(stage) >= STAGES.index(self.start)
        return stage in self.pipeline.settings.stages and late_enough

    @property
    def manifest(self) -> Path:
        """The manifest of the cases that are used."""
        return self.out / "manifest.csv"

    @property
    def cache(self) -> Path:
        """Cached image embeddings, shared by methods and folds."""
        return self.out / "cache"

    def fold_manifests(self) -> list[tuple[str, Path]]:
        """Name (empty where there are no folds) and manifest of every fold."""
        n = self.pipeline.settings.folds
        return (
            [("", self.manifest)]
            if n is None
            else [(f"fold{f}", self.out / "folds" / f"fold{f}.csv") for f in range(n)]
        )

    def run_folder(self, method: Method, fold: str) -> Path:
        """Folder of one method on one fold."""
        folder = self.out / "runs" / method.label
        return folder / fold if fold else folder


def check_cases(place: Workplace) -> None:
    """Refuse a manifest without cases to train on, to fit on or to score, before the work that would come to nothing.

    Folds have the first and the last.

    Raises
    ------
    ManifestError
    """
    folds = place.pipeline.settings.folds is not None
    records = [] if folds else read_manifest(place.manifest)
    fitted = [m.label for m in place.pipeline.methods if m.config.train.postprocess == "fitted"]
    if place.runs("train") and fitted and not any(record.split == "val" for record in records):
        raise ManifestError(
            f"train.postprocess=fitted (of {', '.join(fitted)}) needs validation cases, and there are none",
            path=place.manifest,
            remedy=("Folds have none: take pipeline.folds away" if folds else "Put cases into the split val")
            + ", or set train.postprocess to none.",
        )
    if folds:
        return
    if place.runs("train") and not any(record.split == "train" and "seg" in record.files for record in records):
        raise ManifestError(
            "no case with a reference is in the split train, so there is nothing to train on",
            path=place.manifest,
            remedy="Give the split a share, or mark cases for it in the manifest.",
        )
    scores = place.runs("predict") or place.runs("evaluate")
    if scores and not any(record.split == place.split for record in records):
        raise ManifestError(
            f"no case is in the split {place.split}, so there is nothing to score",
            path=place.manifest,
            remedy="Give the split a share, or mark cases for it in the manifest.",
        )


class timed:
    """Adds the seconds of a block to the workplace's record."""

    def __init__(self, place: Workplace, name: str) -> None:
        self.place, self.name = place, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.started
        self.place.seconds[self.name] = self.place.seconds.get(self.name, 0.0) + spent
