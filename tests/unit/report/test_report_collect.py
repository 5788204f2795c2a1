"""What counts as a run, and how runs are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medsam_lora.errors import DataError
from medsam_lora.io.tables import PER_CASE_COLUMNS, SUMMARY_COLUMNS, write_table
from medsam_lora.report.collect import collect
from medsam_lora.report.scores import extremes, headline

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a per_case.csv with the Dice of cases a, b, ... by method."""

    def write_scores(folder: str, **dice: list[float]) -> Path:
        rows = [
            dict.fromkeys(PER_CASE_COLUMNS, "")
            | {"case_id": case, "patient_id": case, "method": method, "region": "WT", "dice": value, "status": "ok"}
            | {"prompt_source": "reference_box"}
            for method, values in dice.items()
            for case, value in zip("abcdefgh", values, strict=False)
        ]
        write_table(tmp_path / folder / "per_case.csv", PER_CASE_COLUMNS, rows)
        return tmp_path / folder

    return write_scores


def test_a_pipeline_gives_the_methods_of_its_summary_and_the_floor_first(write: Write, tmp_path: Path) -> None:
    for method in ("lora", "filled_box", "left_over"):
        write(f"p/runs/{method}", **{method: [0.5, 0.75]})
    rows = [dict.fromkeys(SUMMARY_COLUMNS, 0) | {"method": m, "region": "WT"} for m in ("lora", "filled_box")]
    write_table(tmp_path / "p" / "summary.csv", SUMMARY_COLUMNS, rows)
    runs, sources = collect([tmp_path / "p"], "filled_box")
    assert [run.label for run in runs] == ["filled_box", "lora"]
    assert [source.path.parent.name for source in sources] == ["lora", "filled_box"]


def test_a_run_brings_the_floor_beside_it(write: Write) -> None:
    write("p/runs/filled_box", filled_box=[0.5])
    runs, _ = collect([write("p/runs/lora", lora=[0.75])], "filled_box")
    assert [run.label for run in runs] == ["filled_box", "lora"]


def test_equal_names_are_told_apart_by_their_folders_and_equal_floors_come_once(write: Write) -> None:
    folders = [write("one", lora=[0.5], filled_box=[0.25]), write("two", lora=[0.75], filled_box=[0.25])]
    runs, _ = collect(folders, "filled_box")
    assert [run.label for run in runs] == ["filled_box", "lora (one)", "lora (two)"]
    other = write("three", lora=[0.5], filled_box=[0.125])
    runs, _ = collect([*folders, other, other], "filled_box")
    assert [run.label for run in runs][:2] == ["filled_box (one)", "filled_box (three)"]
    assert len(runs) == 5


def test_folds_bring_their_records(write: Write) -> None:
    folder = write("runs/lora", lora=[0.5])
    for fold in (0, 1):
        (folder / f"fold{fold}" / "predictions").mkdir(parents=True)
        (folder / f"fold{fold}" / "run.json").write_text(f'{{"duration_s": {fold}}}')
    run = collect([folder], "filled_box")[0][0]
    assert [(record.part, record.data["duration_s"]) for record in run.training] == [("fold0", 0), ("fold1", 1)]
    assert [path.parent.name for path in run.predictions] == ["fold0", "fold1"]


def test_what_holds_no_scores_is_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        collect([tmp_path / "nowhere"], "filled_box")
    with pytest.raises(DataError, match=r"no per_case\.csv, no summary\.csv"):
        collect([tmp_path], "filled_box")
    folder = write("bad", lora=[0.5])
    path = folder / "per_case.csv"
    path.write_text(path.read_text().replace("0.5", "half"))
    with pytest.raises(DataError, match=r"case a: .*data line 1: could not convert"):
        collect([folder], "filled_box")
    path.write_text("case_id,dice\n")
    with pytest.raises(DataError, match="lacks the column patient_id"):
        collect([folder], "filled_box")


def test_differences_are_paired_and_to_the_first_method(write: Write) -> None:
    folder = write("s", filled_box=[0.25, 0.25], base=[0.5, 0.5], lora=[0.75, 0.5, 1.0])
    rows = {row.label: row for row in headline(collect([folder], "filled_box")[0], "filled_box", 50, 0)}
    assert rows["base"].difference is None and rows["base"].is_reference and rows["filled_box"].is_floor
    gap = rows["lora"].difference
    # Case c has no partner: two pairs, of +0.25 and 0.
    assert gap is not None
    assert (gap.dice.mean.value, gap.won.value, gap.pairs.value) == (0.125, 1, 2)
    assert rows["lora"].scores["dice"].mean.value == 0.75 and "hd95_mm" not in rows["lora"].scores


@pytest.mark.parametrize(("n", "worst", "best"), [(1, "a", ""), (3, "ab", "c"), (5, "abc", "ed"), (7, "abc", "gfe")])
def test_no_case_is_among_the_worst_and_the_best(write: Write, n: int, worst: str, best: str) -> None:
    run = collect([write("s", lora=[i / 10 for i in range(n)])], "filled_box")[0][0]
    low, high = extremes(run, "WT")
    assert "".join(row["case_id"] for row in low) == worst
    assert "".join(row["case_id"] for row in high) == best
