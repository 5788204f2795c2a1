"""The exception hierarchy: one line that names case, file and remedy, and survives worker processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from medsam_lora import errors
from medsam_lora.errors import DataError, MedsamLoraError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MedsamLoraError)]


def test_the_line_names_case_file_fault_and_remedy_in_this_order():
    error = DataError("the file is empty.", case_id="a-1", path="x/t1n.nii.gz", remedy="Copy it again.")
    assert str(error) == "case a-1: x/t1n.nii.gz: the file is empty. Remedy: Copy it again."


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "odd"),
        ({"case_id": "a"}, "case a: odd"),
        ({"path": Path("f")}, "f: odd"),
        ({"remedy": "Mend it."}, "odd. Remedy: Mend it."),
    ],
)
def test_parts_that_are_not_given_leave_no_trace(options, line):
    assert str(MedsamLoraError("odd", **options)) == line


def test_a_question_keeps_its_mark_without_a_full_stop_behind_it():
    assert str(MedsamLoraError("did you mean b?", remedy="Use b.")) == "did you mean b? Remedy: Use b."


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_the_pickling_between_processes(kind):
    error = kind("odd", case_id="a-1", path="f.nii", remedy="Mend it.", code="unreadable")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.case_id, copy.path, copy.remedy, copy.code) == (
        "odd",
        "a-1",
        Path("f.nii"),
        "Mend it.",
        "unreadable",
    )


def test_one_except_clause_catches_them_all():
    assert len(KINDS) >= 8
    for kind in KINDS:
        with pytest.raises(MedsamLoraError, match="odd"):
            raise kind("odd")
