"""Which slices are taken."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from medsam_lora.errors import DataError
from medsam_lora.transforms import SLICINGS
from medsam_lora.transforms.slicing import SlicingPlan, case_generator, select_slices

#                  0  1  2  3  4  5  6  7  8  9
AREAS = np.array([0, 0, 4, 9, 9, 1, 0, 2, 0, 0])
BRAIN = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 0], bool)


def select(plan: SlicingPlan, areas: np.ndarray | None = AREAS, case_id: str = "a") -> list[int]:
    return select_slices(SLICINGS[plan.name], areas, BRAIN, plan, case_id).tolist()


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (SlicingPlan("full"), [2, 3, 4, 5, 7]),
        (SlicingPlan("full", tumour_only=False), list(range(10))),
        (SlicingPlan("every_second"), [2, 4, 7]),
        (SlicingPlan("every_second", step=4), [2, 7]),
        (SlicingPlan("every_second", step=4, tumour_only=False), [0, 4, 8]),
        (SlicingPlan("max_slice"), [3]),
        (SlicingPlan("max_slice", tumour_only=False), [3]),
    ],
)
def test_by_hand(plan, expected):
    assert select(plan) == expected


def test_random_takes_count_slices_that_depend_on_seed_and_case_only():
    drawn = select(SlicingPlan("random", count=3))
    assert len(drawn) == 3 and set(drawn) <= {2, 3, 4, 5, 7}
    assert drawn == select(SlicingPlan("random", count=3))
    others = [select(SlicingPlan("random", count=3, seed=s), case_id=c) for s in range(4) for c in "abcd"]
    assert len({tuple(o) for o in others}) > 3
    assert select(SlicingPlan("random", count=99)) == [2, 3, 4, 5, 7]


def test_the_draw_is_the_same_in_every_process():
    # Python salts the hash of strings anew in every process.
    code = (
        "from medsam_lora.transforms.slicing import case_generator;"
        "print(case_generator(3, 'BraTS-MEN-00004-000').integers(0, 10**9))"
    )
    here = int(case_generator(3, "BraTS-MEN-00004-000").integers(0, 10**9))
    for salt in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": salt}
        )
        assert int(ran.stdout) == here


def test_empty_share_adds_brain_slices_without_tumour():
    # Free of tumour but showing brain: 1, 6, 8. A quarter of the result besides 5 tumour slices: 5/3, rounded to 2.
    taken = select(SlicingPlan("full", empty_share=0.25))
    empty = sorted(set(taken) - {2, 3, 4, 5, 7})
    assert {2, 3, 4, 5, 7} <= set(taken) and taken == sorted(taken)
    assert len(empty) == 2 and set(empty) <= {1, 6, 8}
    # More than there are: all of them, and never 0 or 9, which show nothing at all.
    assert select(SlicingPlan("full", empty_share=0.9)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(select(SlicingPlan("max_slice", empty_share=0.5))) == 2


def test_a_case_without_what_is_needed_is_refused_with_the_remedy():
    for areas, message in ((None, "no reference"), (np.zeros(10, int), "nothing of the region")):
        with pytest.raises(DataError, match=message) as caught:
            select(SlicingPlan("full"), areas)
        assert caught.value.case_id == "a" and "tumour_only=false" in str(caught.value.remedy)
        with pytest.raises(DataError, match=message):
            select(SlicingPlan("max_slice", tumour_only=False), areas)
    assert select(SlicingPlan("every_second", tumour_only=False), None) == [0, 2, 4, 6, 8]
