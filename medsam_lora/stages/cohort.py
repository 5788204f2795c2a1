"""The first stage of a pipeline: where the cases are, which of them are usable, and which fold each is in."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from medsam_lora.errors import ManifestError
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.manifest import folds as deal_folds
from medsam_lora.io.manifest import parse_manifest, read_manifest, write_manifest
from medsam_lora.records import CaseRecord
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.pipeline import Pipeline
from medsam_lora.stages.verify import verify
from medsam_lora.stages.workplace import Workplace

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[2]


def default_root() -> Path:
    """Where the real cases are: ``$MEDSAM_LORA_BRATS_DIR``, else ``shared/data/brats`` beside the checkout."""
    named = os.environ.get("MEDSAM_LORA_BRATS_DIR")
    return Path(named) if named else CHECKOUT.parent / "shared" / "data" / "brats"


def find_cohort(pipeline: Pipeline, out: Path, workers: int) -> Path:
    """The data root of a pipeline: a synthetic cohort made in `out`, the root it names, or the default one.

    Raises
    ------
    ManifestError
        Where that is no folder.
    """
    settings = pipeline.settings
    if settings.phantom is not None:
        from medsam_lora.datasets.phantom import make_cohort

        x, y, z = settings.phantom.shape
        make_cohort(out / "cohort", settings.phantom.cases, settings.phantom.seed, (x, y, z), workers=workers)
        return out / "cohort"
    root = default_root() if settings.root is None else Path(settings.root)
    if not root.is_dir():
        raise ManifestError(
            "the data root is not a folder", path=root, remedy="Give --root DIR, or set MEDSAM_LORA_BRATS_DIR."
        )
    return root


def choose_cases(place: Workplace) -> None:
    """Write ``cohort.csv`` (all cases), ``findings.csv``, ``manifest.csv`` (those used) and the folds.

    Cases with an error are left out and become failures of the workplace. Nothing is done where ``--from`` starts
    later.

    Raises
    ------
    ManifestError
        Where there is no usable case, or ``--from`` starts later and there is no manifest yet.
    """
    settings, data = place.pipeline.settings, place.pipeline.base.data
    if not place.runs("verify"):
        missing = [m for _, m in place.fold_manifests() if not m.is_file()]
        if place.start is not None and not missing:
            return
        if place.start is not None:
            raise ManifestError("no such file", path=missing[0], remedy="Run without --from first.")
    whole = place.out / "cohort.csv"
    if settings.manifest is None:
        # Split anew, by the seed: an older table may stand for other settings or other cases. What was trained on
        # other splits is trained again.
        whole.unlink(missing_ok=True)
        shares = {"train": settings.split.train, "val": settings.split.val, "test": settings.split.test}
        build_manifest(place.root, whole, shares, settings.split.seed)
    else:
        given = Path(settings.manifest)
        if not given.is_file():
            raise ManifestError("no such file", path=given, remedy="Check --manifest.")
        write_bytes_atomically(whole, given.read_bytes())
    # Lines that contradict each other are findings of verify, so that the other cases go on.
    records = [r for _, r in parse_manifest(whole)] if "verify" in settings.stages else read_manifest(whole)
    if "verify" in settings.stages:
        findings = verify(
            whole,
            place.root,
            place.out / "findings.csv",
            workers=place.workers,
            max_bytes=int(data.max_gib * 2**30),
            nonfinite=data.nonfinite,
        )
        errors = [f for f in findings if f.severity == "error"]
        place.failures += errors
        bad = {f.case_id for f in errors}
        for case_id in sorted(bad):
            logger.error("case %s is left out: see findings.csv", case_id)
        records = [r for r in records if r.case_id not in bad]
    if not records:
        raise ManifestError("no usable case is left", path=whole, remedy="See findings.csv for the faults.")
    write_manifest(place.manifest, records)
    if settings.folds is not None:
        _write_folds(place, records, settings.folds)


def _write_folds(place: Workplace, records: Sequence[CaseRecord], n: int) -> None:
    scored = [r for r in records if "seg" in r.files]
    for (_, path), dealt in zip(
        place.fold_manifests(), deal_folds(scored, n, place.pipeline.settings.split.seed), strict=True
    ):
        write_manifest(path, dealt)
