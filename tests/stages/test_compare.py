"""``compare`` from tables on disk to statistics, page and plots."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from medsam_lora import cli
from medsam_lora.errors import ConfigError, DataError
from medsam_lora.io.tables import PER_CASE_COLUMNS, PER_PATIENT_COLUMNS, STATISTICS_COLUMNS, write_table
from medsam_lora.stages.compare import compare

GAIN = {"filled_box": -0.2, "zero_shot": 0.0, "lora": 0.1, "lora_r4": 0.1, "lora_r16": 0.15}
TABLES = {"statistics.csv", "per_patient.csv", "runs.csv"}
CASES = [f"p{i}-{time}" for i in range(6) for time in range(1 if i else 2)]


def rows_of(method: str, regions: tuple[str, ...] = ("WT",), **changes: Any) -> list[dict[str, Any]]:
    """Seven cases of six patients; a method's gain over zero-shot grows a little from case to case."""
    return [
        {
            "case_id": case, "patient_id": case.partition("-")[0], "run": method, "method": method, "region": region,
            "dice": 0.5 + i / 50 + GAIN[method] * (1 + i / 100), "iou": 0.4, "sensitivity": 0.5, "precision": 0.5,
            "reference_volume_ml": 10.0 + i, "prediction_volume_ml": 11.0 + i + GAIN[method], "n_slices": 5,
            "prompt_source": "reference_box", "status": "ok", "postprocess": "none", "volume_difference_ml": 1.0,
        } | changes
        for region in regions
        for i, case in enumerate(CASES)
    ]  # fmt: skip


def write(folder: Path, rows: list[dict[str, Any]], settings: Mapping[str, Any] | None = None) -> Path:
    write_table(folder / "per_case.csv", PER_CASE_COLUMNS, rows)
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def settings(name: str, rank: int, lr: float = 1e-4) -> dict[str, Any]:
    return {"method": {"name": name, "rank": rank, "alpha": 8.0}, "train": {"lr": lr}}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Zero-shot, LoRA, and the floor, as a pipeline leaves them."""
    lora = write(tmp_path / "runs" / "lora", rows_of("lora"), settings("lora", 8))
    log = [{"epoch": e, "loss": 1 / (e + 1) if e else None, "train_dice": None, "val_dice": 0.5} for e in range(3)]
    write_table(lora / "log.csv", ("epoch", "loss", "train_dice", "val_dice"), log)
    # Every setting stands in the file, also a rank that zero-shot does not read.
    zero_shot = write(tmp_path / "runs" / "zero_shot", rows_of("zero_shot"), settings("zero_shot", 4))
    return [zero_shot, lora, write(tmp_path / "runs" / "filled_box", rows_of("filled_box"))]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_everything_is_written(runs: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    rows = compare([*runs[:2], runs[2] / "per_case.csv"], out)
    plots = {f"{stem}.{end}" for stem in ("paired_dice_WT", "bland_altman_WT", "curves") for end in ("svg", "png")}
    assert names(out) == {*TABLES, "comparison.md", "comparison.json", *plots}
    assert [(r["family"], r["method"], r["baseline"]) for r in rows] == [
        ("methods", "lora", "zero_shot"), ("floor", "zero_shot", "filled_box"), ("floor", "lora", "filled_box")
    ]  # fmt: skip
    written = table(out / "statistics.csv")
    assert tuple(written[0]) == STATISTICS_COLUMNS
    assert [float(r["mean_difference"]) for r in written] == [r["mean_difference"] for r in rows]
    # Gains 0.1 (1 + i / 100), i = 0 to 6: their mean is that of i = 3. Six patients of one sign: p = 2 / 2^6.
    assert rows[0]["mean_difference"] == pytest.approx(0.103) and rows[0]["p_value"] == 2 / 2**6
    assert (rows[0]["n_cases"], rows[0]["n_patients"], rows[0]["verdict"]) == (7, 6, "better")
    patients = table(out / "per_patient.csv")
    assert tuple(patients[0]) == (*PER_PATIENT_COLUMNS, "dice")
    first = next(r for r in patients if (r["patient_id"], r["method"]) == ("p0", "zero_shot"))
    assert (first["n_cases"], float(first["dice"])) == ("2", pytest.approx(0.51))
    for name in plots:
        if name.endswith("svg"):
            assert ElementTree.parse(out / name).getroot().get("role") == "img"
        else:
            Image.open(out / name).verify()


def test_the_page_says_what_was_found_and_what_not(runs: list[Path], tmp_path: Path):
    compare(runs, tmp_path / "out", bootstrap=200)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "LoRA beats zero-shot by 0.103 Dice (95 % 0.10" in page and "higher in 7 of 7 cases, p = 0.031" in page
    assert "7 cases of 6 patients, prompts: reference_box. The baseline is zero-shot." in page
    assert "the smallest p possible is 2 / 2^6 = 0.031." in page
    assert "Holm's correction is over the 2 comparisons of this table." in page
    assert "a rank sweep is not drawn: no two runs of one method differ in method.rank" in page
    lines = page.splitlines()
    for picture in (line for line in lines if line.startswith("![")):
        assert (tmp_path / "out" / picture.rpartition("](")[2].rstrip(")")).is_file()
    # Every table is one: as many cells in each line as in its head.
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert above.count("|") == below.count("|")


def test_equal_inputs_give_equal_files(runs: list[Path], tmp_path: Path):
    for name in ("one", "two"):
        compare(runs, tmp_path / name, bootstrap=100, seed=3)
    for name in names(tmp_path / "one") - {"comparison.json"}:  # the record has the time
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    record = json.loads((tmp_path / "one" / "comparison.json").read_text())
    assert (record["seed"], record["bootstrap"], record["baseline"]) == (3, 100, "zero_shot")
    assert [len(entry["sha256"]) for entry in record["tables"]] == [64] * 3


def test_one_table_of_a_method_and_its_floor_is_enough(tmp_path: Path):
    run = write(tmp_path / "lora", rows_of("lora") + rows_of("filled_box", run="lora"))
    (row,) = compare([run], tmp_path / "out", bootstrap=50)
    assert (row["family"], row["method"], row["baseline"]) == ("floor", "lora", "filled_box")


def test_the_baseline_can_be_chosen(runs: list[Path], tmp_path: Path):
    rows = compare(runs, tmp_path / "out", baseline="lora", bootstrap=50)
    assert (rows[0]["method"], rows[0]["baseline"], rows[0]["verdict"]) == ("zero_shot", "lora", "worse")
    rows = compare(runs, tmp_path / "out", baseline="filled_box", bootstrap=50)
    assert {r["baseline"] for r in rows} == {"filled_box"} and len(rows) == 2
    with pytest.raises(ConfigError, match=r"'lroa'; did you mean lora\?.*"):
        compare(runs, tmp_path / "out", baseline="lroa")


def test_a_rank_sweep_is_drawn_from_the_settings_beside_the_tables(runs: list[Path], tmp_path: Path):
    sweep = []
    for rank, lr in ((4, 1e-4), (16, 2e-4)):
        label = f"lora_r{rank}"
        folder = write(tmp_path / "runs" / label, rows_of(label), settings("lora", rank, lr))
        fold = folder / "fold0"
        fold.mkdir()
        (fold / "run.json").write_text(json.dumps({"trainable_parameters": 1000 * rank}))
        sweep.append(folder)
    compare([runs[0], *sweep, runs[2]], tmp_path / "out", bootstrap=50)
    text = (tmp_path / "out" / "rank_sweep.svg").read_text()
    for label in (
        ">4<",
        ">16<",
        ">parameters trained<",
        ">zero-shot: mean<",
        ">filled box (floor): mean<",
        ">Whole tumour (WT)<",
    ):
        assert label in text
    assert (tmp_path / "out" / "rank_sweep.png").is_file()
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "differ in more than the rank: train.lr" in page and "rank sweep is not drawn" not in page


def run_of(folder: Path, gain: float, cost: float, **keys: Any) -> Path:
    """A scored run with its settings and its record."""
    rows = rows_of("lora")
    for row in rows:
        row["run"], row["dice"] = folder.name, row["dice"] + gain
    method = {"name": "lora", "rank": keys.pop("rank", 4), "scaling": keys.pop("scaling", "none")}
    write(folder, rows, {"method": method, "train": keys})
    record = {"trainable_parameters": 100, "peak_memory_mib": cost, "train_seconds": cost / 10, "seconds_per_step": 0.5}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_seeds_are_taken_together_and_their_spread_is_not_that_of_the_cases(runs: list[Path], tmp_path: Path):
    seeds = [run_of(tmp_path / f"r4,seed={n}", gain, 100 + n, seed=n) for n, gain in enumerate((0.0, 0.1))]
    other = run_of(tmp_path / "r16,seed=0", 0.0, 300, seed=0, rank=16)
    compare([runs[0], *seeds, other, runs[2]], tmp_path / "out", bootstrap=100, seed=2)
    rows = {r["method"]: r for r in table(tmp_path / "out" / "runs.csv")}
    one = rows["lora (r4,seed=1)"]
    assert (one["seed"], one["trainable_parameters"], one["peak_memory_mib"]) == ("1", "100", "101")
    assert (one["train_seconds"], one["seconds_per_step"], rows["zero_shot"]["seed"]) == ("10.1", "0.5", "")
    (together,) = table(tmp_path / "out" / "seeds.csv")
    assert (together["method"], together["n_seeds"], together["n_cases"]) == ("lora (r4)", "2", "7")
    means = [float(rows[f"lora (r4,seed={n})"]["dice_mean"]) for n in (0, 1)]
    assert float(together["dice_mean"]) == pytest.approx(sum(means) / 2)
    # Two means 0.1 apart: a sample standard deviation of 0.1 / sqrt(2).
    assert float(together["seed_sd"]) == pytest.approx(0.1 / 2**0.5)
    assert (float(together["seed_low"]), float(together["seed_high"])) == (
        pytest.approx(means[0]),
        pytest.approx(means[1]),
    )
    # Of two seeds that lie the same distance apart in every case, the interval over patients is that of one of them.
    width = float(one["dice_high"]) - float(one["dice_low"])
    assert float(together["dice_high"]) - float(together["dice_low"]) == pytest.approx(width)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "## What the runs cost" in page and "## Seeds" in page
    assert {"costs.svg", "rank_sweep.svg", "seeds.csv"} <= names(tmp_path / "out")


def test_runs_of_one_rank_that_differ_are_two_curves(runs: list[Path], tmp_path: Path):
    sweep = [
        run_of(tmp_path / f"r{rank}{scaling[0]}", 0.0, 100, rank=rank, scaling=scaling)
        for rank in (4, 16)
        for scaling in ("none", "alpha/r")
    ]
    compare([runs[0], *sweep], tmp_path / "out", bootstrap=50)
    text = (tmp_path / "out" / "rank_sweep.svg").read_text()
    for scaling in ("none", "alpha/r"):
        assert f">LoRA, scaling {scaling}: mean, 95 % interval<" in text
    assert "differ in more than" not in (tmp_path / "out" / "comparison.md").read_text()


def test_another_setting_can_be_the_axis(runs: list[Path], tmp_path: Path):
    sweep = [run_of(tmp_path / s.replace("/", "-"), 0.0, 100, scaling=s) for s in ("none", "alpha/r", "alpha/sqrt(r)")]
    compare([runs[0], *sweep, runs[2]], tmp_path / "out", bootstrap=50, by="method.scaling")
    text = (tmp_path / "out" / "sweep.svg").read_text()
    for label in (">alpha/sqrt(r)<", ">scaling<", ">zero-shot: mean<", ">filled box (floor): mean<"):
        assert label in text
    with pytest.raises(ConfigError, match=r"unknown key method\.scalings; did you mean method\.scaling\?"):
        compare([runs[0], *sweep], tmp_path / "other", by="method.scalings")


def test_of_many_methods_the_cases_are_not_drawn(tmp_path: Path):
    many = [run_of(tmp_path / f"r{rank}", rank / 1000, 100 + rank, rank=rank) for rank in range(1, 19)]
    compare(many, tmp_path / "out", bootstrap=20)
    assert "more than 16 methods are not drawn" in (tmp_path / "out" / "comparison.md").read_text()
    assert {n for n in names(tmp_path / "out") if n.endswith("png")} == {"rank_sweep.png", "costs.png"}


@pytest.mark.parametrize("broken", ["log.csv", "config.yaml", "run.json"])
def test_broken_files_beside_a_table_cost_a_plot_and_nothing_else(broken: str, runs: list[Path], tmp_path: Path):
    (runs[1] / broken).write_text("epoch,loss\none,{\n" if broken == "log.csv" else "{[\n")
    assert len(compare(runs, tmp_path / "out", bootstrap=50)) == 3
    page = (tmp_path / "out" / "comparison.md").read_text()
    if broken == "log.csv":
        assert "the training of LoRA is not drawn" in page and not (tmp_path / "out" / "curves.svg").exists()
    if broken == "config.yaml":
        assert "lora is not in a rank sweep" in page


def test_failed_cases_stay_in_with_their_worst_score(runs: list[Path], tmp_path: Path):
    rows = rows_of("lora")
    rows[2] |= {"dice": 0.0, "status": "missing", "prediction_volume_ml": None, "volume_difference_ml": None}
    write(runs[1], rows)
    result = compare(runs, tmp_path / "out", bootstrap=50)[0]
    assert (result["n_failed"], result["n_cases"], result["losses"]) == (1, 7, 1)
    assert "1 without a prediction" in (tmp_path / "out" / "bland_altman_WT.svg").read_text()
    assert "no usable prediction" in (tmp_path / "out" / "paired_dice_WT.svg").read_text()
    with pytest.raises(DataError, match=r"case p1-0: .*no volume_difference_ml \(status missing\)"):
        compare(runs, tmp_path / "out", metrics=["volume_difference_ml"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_source": "box_table"}, "the prompt sources differ for p0-0, p0-1, p1-0, p2-0, p3-0 and 2 more"),
        ({"region": "TC"}, "the regions differ: zero_shot has WT, lora has TC"),
        ({"reference_volume_ml": 99.0}, "the references differ for p0-0"),
    ],
)
def test_a_refusal_writes_nothing(change: dict[str, Any], words: str, runs: list[Path], tmp_path: Path):
    write(runs[1], rows_of("lora", **change))
    with pytest.raises(DataError, match=words):
        compare(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unusable_arguments(runs: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"no per_case\.csv here"):
        compare([tmp_path], out)
    with pytest.raises(DataError, match="no such file"):
        compare([tmp_path / "nothing.csv"], out)
    with pytest.raises(ConfigError, match="given twice"):
        compare([runs[0], runs[0] / "per_case.csv"], out)
    with pytest.raises(DataError, match="no method but the floor"):
        compare([runs[2]], out)
    with pytest.raises(DataError, match="one method only, lora"):
        compare([runs[1]], out)
    with pytest.raises(ConfigError, match="0 resamples"):
        compare(runs, out, bootstrap=0)
    write_table(tmp_path / "empty" / "per_case.csv", PER_CASE_COLUMNS, [])
    with pytest.raises(DataError, match="no rows"):
        compare([runs[0], tmp_path / "empty"], out)
    with pytest.raises(ConfigError, match="no table has the column hd95_mm"):
        compare(runs, out, metrics=["hd95_mm"])
    assert not out.exists()


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [*map(str, runs), "--out", str(tmp_path / "out"), "--metric", "dice, iou", "--bootstrap", "100"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["--quiet", "compare", *words])
    out, err = capsys.readouterr()
    assert (stop.value.code or 0, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("whole tumour (WT): LoRA beats zero-shot by 0.103 Dice")
    assert lines[-1] == f"compared: {tmp_path / 'out' / 'comparison.md'}" and len(lines) == 4
    assert {r["metric"] for r in table(tmp_path / "out" / "statistics.csv")} == {"dice", "iou"}


def test_the_command_refuses_on_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(runs[1], rows_of("lora")[:-1])
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "the case lists differ for WT: 1 only in zero_shot (p5-0)" in err and "Remedy: " in err


def test_comparing_needs_no_torch():
    script = "import sys, medsam_lora.stages.compare\nprint({'torch', 'monai', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
