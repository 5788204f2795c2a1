"""Which transverse slices of a case are taken.

First the candidates: all slices, or those that show the region (`tumour_only`). A slicing (a key of
`transforms.SLICINGS`) takes some of them; `empty_share` then adds slices that show brain but none of the region.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medsam_lora.errors import DataError


def stack_around(ks: Sequence[int], n: int, depth: int) -> list[int]:
    """The slices of a stack of neighbours, for methods that look at several.

    Parameters
    ----------
    ks : sequence of int
        Slice indices of one case that are there, ascending.
    n : int
        Which of them stands in the middle.
    depth : int
        Slices of the stack, odd.

    Returns
    -------
    list of int
        Positions in `ks`, ascending. Where a neighbour is not there, the next one towards the middle stands in its
        place.

    Examples
    --------
    >>> stack_around([4, 5, 6, 9], 1, 5)
    [0, 0, 1, 2, 2]
    >>> stack_around([4, 5, 6, 9], 3, 3)
    [3, 3, 3]
    """
    position = {k: i for i, k in enumerate(ks)}
    sides = []
    for direction in (-1, 1):
        found = [n]
        for step in range(1, depth // 2 + 1):
            found.append(position.get(ks[n] + direction * step, found[-1]))
        sides.append(found[1:])
    return [*reversed(sides[0]), n, *sides[1]]


@dataclass(frozen=True)
class SlicingPlan:
    """How slices are chosen.

    Parameters
    ----------
    name : str
        A key of `transforms.SLICINGS`.
    step : int
        Of ``every_second``.
    count : int
        Of ``random``.
    seed : int
        Of ``random`` and of the empty slices.
    tumour_only : bool
        Choose among the slices that show the region.
    empty_share : float
        Share of the result, in [0, 1), that shows brain but not the region; needs `tumour_only`.
    """

    name: str = "full"
    step: int = 2
    count: int = 16
    seed: int = 0
    tumour_only: bool = True
    empty_share: float = 0.0


Slicing = Callable[[np.ndarray, np.ndarray, SlicingPlan, np.random.Generator], np.ndarray]
"""(candidates (n,), areas (Z,), plan, generator) to the indices taken, ascending."""


def every_candidate(
    candidates: np.ndarray, areas: np.ndarray, plan: SlicingPlan, generator: np.random.Generator
) -> np.ndarray:
    """All candidates."""
    return candidates


def every_step(
    candidates: np.ndarray, areas: np.ndarray, plan: SlicingPlan, generator: np.random.Generator
) -> np.ndarray:
    """Every `plan.step`-th candidate, from the first."""
    return candidates[:: plan.step]


def random_count(
    candidates: np.ndarray, areas: np.ndarray, plan: SlicingPlan, generator: np.random.Generator
) -> np.ndarray:
    """`plan.count` candidates drawn without replacement, or all where there are fewer."""
    count = min(plan.count, len(candidates))
    return np.sort(generator.choice(candidates, count, replace=False))


def largest_area(
    candidates: np.ndarray, areas: np.ndarray, plan: SlicingPlan, generator: np.random.Generator
) -> np.ndarray:
    """The candidate with the largest area of the region, the lowest of equals."""
    return candidates[[int(areas[candidates].argmax())]]


def case_generator(seed: int, case_id: str) -> np.random.Generator:
    """A generator that depends on the seed and the case alone, the same on every machine and in every process.

    Python's own hash of a string differs from process to process.
    """
    digest = hashlib.sha256(case_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def select_slices(
    choose: Slicing, areas: np.ndarray | None, brain: np.ndarray, plan: SlicingPlan, case_id: str
) -> np.ndarray:
    """Indices of the slices taken, ascending.

    Parameters
    ----------
    choose : Slicing
        An entry of `transforms.SLICINGS`, that of `plan.name`.
    areas : ndarray of int, shape (Z,), or None
        Voxels of the region in every slice; None where the case has no reference.
    brain : ndarray of bool, shape (Z,)
        Slices that show any non-zero voxel.
    plan : SlicingPlan
    case_id : str

    Returns
    -------
    ndarray of int64, shape (N,)

    Raises
    ------
    DataError
        Where the reference is needed and absent, or shows nothing of the region.

    Examples
    --------
    >>> areas, brain = np.array([0, 0, 4, 9, 1, 0]), np.array([False, True, True, True, True, False])
    >>> select_slices(largest_area, areas, brain, SlicingPlan("max_slice"), "a").tolist()
    [3]
    >>> select_slices(every_candidate, areas, brain, SlicingPlan("full", empty_share=0.25), "a").tolist()
    [1, 2, 3, 4]
    """
    needs_reference = plan.tumour_only or plan.name == "max_slice"
    if needs_reference and (areas is None or not areas.any()):
        raise DataError(
            "the case has no reference" if areas is None else "the reference shows nothing of the region",
            case_id=case_id,
            remedy="Set slicing.tumour_only=false and slicing.name=full, or leave the case out of the manifest.",
            code="empty_reference" if areas is not None else "missing_file",
        )
    if areas is None:
        areas = np.zeros(len(brain), np.int64)
    generator = case_generator(plan.seed, case_id)
    candidates = np.flatnonzero(areas) if plan.tumour_only else np.arange(len(areas))
    taken = choose(candidates, areas, plan, generator)
    if not plan.tumour_only or plan.empty_share == 0:
        return taken
    empty = np.flatnonzero(brain & (areas == 0))
    wanted = round(len(taken) * plan.empty_share / (1 - plan.empty_share))
    drawn = generator.choice(empty, min(wanted, len(empty)), replace=False)
    return np.sort(np.concatenate([taken, drawn]))
