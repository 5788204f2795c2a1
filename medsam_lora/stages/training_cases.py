"""Which cases of a store a method is trained and validated on, and whether they suit its settings."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from medsam_lora.errors import PreparedError, TrainingError
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.store import open_store, read_index
from medsam_lora.labels import regions_of
from medsam_lora.records import PreparedSlices

FEW_NEIGHBOURS = 0.5
"""Share of the neighbours of slices that are in the store below which `check_neighbours` warns."""

logger = logging.getLogger(__name__)

# Without validation cases the reloaded adapter is checked on this many slices of a training case.
_CHECK_SLICES = 8


def find_store(prepared: Path) -> Path:
    """The store at or below `prepared`.

    Raises
    ------
    PreparedError
        Where there is none, or several to choose from.
    """
    if (prepared / "plan.json").is_file():
        return prepared
    found = sorted(p.parent for p in prepared.glob("*/plan.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise PreparedError("no prepared store is here", path=prepared, remedy="Run medsam-lora prepare first.")
    names = ", ".join(p.name for p in found)
    raise PreparedError(f"several stores are here ({names})", path=prepared, remedy="Give one of them as --prepared.")


def split_cases(store: Path, manifest: Path | None) -> tuple[list[PreparedSlices], list[PreparedSlices]]:
    """Training and validation cases of a store, by the manifest's splits where one is given.

    Raises
    ------
    PreparedError
        Where a training or validation case of the manifest is not in the store.
    TrainingError
        Where there is no training case.
    """
    cases = {case.case_id: case for case in open_store(store)}
    if manifest is not None:
        wanted = {r.case_id: r.split for r in read_manifest(manifest) if r.split in ("train", "val")}
        absent = sorted(set(wanted) - set(cases))
        if absent:
            raise PreparedError(
                f"{len(absent)} cases of the manifest are not in the store: {', '.join(absent[:5])}",
                path=store,
                remedy="Run medsam-lora prepare again, or take the cases that failed out of the manifest.",
            )
        cases = {i: dataclasses.replace(cases[i], split=split) for i, split in wanted.items()}
    training = [case for case in cases.values() if case.split == "train" and case.label is not None]
    validation = [case for case in cases.values() if case.split == "val" and case.label is not None]
    if not training:
        raise TrainingError(
            "no case with a reference is in the split 'train'",
            path=manifest or store,
            remedy="Build the manifest with --train above 0.",
        )
    return training, validation


def check_cases(
    cases: Sequence[PreparedSlices], modalities: Sequence[str], regions: Sequence[str], store: Path
) -> None:
    """Refuse cases that lack what the settings ask for.

    Raises
    ------
    PreparedError
        Where the store holds other modalities.
    TrainingError
        Where a reference does not tell the regions apart.
    """
    for case in cases:
        if tuple(case.modalities) != tuple(modalities):
            raise PreparedError(
                f"the store holds {', '.join(case.modalities)}, the configuration asks for {', '.join(modalities)}",
                case_id=case.case_id,
                remedy="Prepare again with the same data.modalities.",
            )
        convention = str(read_index(store / case.case_id).get("label_convention", "brats2023"))
        unknown = [region for region in regions if region not in regions_of(convention)]
        if unknown:
            raise TrainingError(
                f"a reference of the convention {convention!r} does not show {', '.join(unknown)}",
                case_id=case.case_id,
                remedy="Train with train.regions: [WT], or leave the case out.",
            )


def check_neighbours(cases: Sequence[PreparedSlices], depth: int, store: Path) -> None:
    """Refuse stacks of neighbouring slices where no slice has a neighbour; say so where half of them have none.

    Parameters
    ----------
    cases : sequence of PreparedSlices
        That are trained on.
    depth : int
        Slices of a stack (`Report.depth`).
    store : Path

    Raises
    ------
    TrainingError
    """
    if depth == 1:
        return
    there = [k + step in known for known in (set(case.ks) for case in cases) for k in known for step in (-1, 1)]
    share = sum(there) / max(len(there), 1)
    if not share:
        raise TrainingError(
            f"method.depth={depth} looks at neighbouring slices, and no slice of the store has one: a stack would "
            "be one slice throughout",
            path=store,
            remedy="Prepare with slicing.name=full, or set method.depth=1.",
        )
    if share < FEW_NEIGHBOURS:
        logger.warning(
            "method.depth=%d looks at neighbouring slices, and only %.0f %% of them are in the store; the slice itself "
            "stands in for the others (slicing.name=full keeps all)",
            *(depth, 100 * share),
        )


def first_slices(case: PreparedSlices) -> PreparedSlices:
    """A case cut to its first few slices."""
    n = _CHECK_SLICES
    label = None if case.label is None else case.label[:n]
    return dataclasses.replace(
        case, image=case.image[:n], label=label, ks=case.ks[:n], mean=case.mean[:n], std=case.std[:n], report={}
    )
