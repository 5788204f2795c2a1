"""A sweep: every point once, whatever happens to the others; table, figure, and the study on validation cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from medsam_lora import cli
from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.errors import ConfigError, DataError
from medsam_lora.models.assemble import build_segmenter, choose_device
from medsam_lora.records import Finding
from medsam_lora.stages import study, sweep_points
from medsam_lora.stages.pipeline import load_pipeline
from medsam_lora.stages.sweep import sweep_file
from medsam_lora.stages.sweep_file import RangeSection, grid_points, load_sweep

BASE: dict[str, Any] = {
    "name": "tiny",
    "description": "tiny",
    "phantom": {"cases": 6, "seed": 3, "shape": [48, 56, 20]},
    "split": {"train": 0.5, "val": 0.2, "test": 0.3, "seed": 0},
    "methods": [{"name": "zero_shot"}, {"name": "lora", "decoder": "frozen"}],
    "model": {"name": "vit_nano", "weights": "random", "image_size": 64},
    "train": {"epochs": 1, "slices_per_epoch": 4, "batch_size": 2, "lr": 1e-3},
    "evaluate": {"bootstrap": 100},
}
# At such a rate the loss is no number in the second step, which nothing can tell before.
GRID = {"method.rank": [2, 4], "train.lr": {"mild": 1e-3, "wrong": 1e30}}


def write(path: Path, **keys: Any) -> Path:
    data = {**BASE, **keys}
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}, sort_keys=False))
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def labels(path: Path, *overrides: str) -> list[str]:
    return [point.label for point in grid_points(load_sweep(path, overrides))]


# ---------------------------------------------------------------- points
def test_every_combination_is_a_point_and_what_no_key_reaches_is_one(tmp_path: Path) -> None:
    scaling = {"alpha": "alpha/r", "stable": "alpha/sqrt(r)"}
    path = write(tmp_path / "s.yaml", grid={"method.rank": [4, 16], "method.scaling": scaling, "train.seed": [0, 1]})
    points = grid_points(load_sweep(path))
    assert [p.label for p in points][:3] == ["zero_shot", "rank=4,scaling=alpha,seed=0", "rank=4,scaling=alpha,seed=1"]
    assert len({p.label for p in points}) == len(points) == 9
    last = points[-1]
    assert last.values == {"method.rank": "16", "method.scaling": "stable", "train.seed": "1"}
    method, train = last.method.config.method, last.method.config.train
    assert (method.rank, method.scaling, train.seed, train.epochs) == (16, "alpha/sqrt(r)", 1, 1)


def test_methods_take_the_keys_that_they_read(tmp_path: Path) -> None:
    methods = [{"name": "zero_shot"}, {"name": "decoder_only"}, {"name": "lora"}]
    path = write(tmp_path / "s.yaml", methods=methods, grid={"method.rank": [4, 8], "train.seed": [0, 1]})
    assert labels(path) == [
        *("zero_shot", "decoder_only,seed=0", "decoder_only,seed=1"),
        *(f"lora,rank={rank},seed={seed}" for rank in (4, 8) for seed in (0, 1)),
    ]
    path = write(
        tmp_path / "n.yaml", methods=[{"name": "lora"}], grid={"method.name": ["full", "lora"], "method.rank": [4, 8]}
    )
    assert labels(path) == ["method=full", "method=lora,rank=4", "method=lora,rank=8"]


def test_a_key_may_be_read_at_some_points_only(tmp_path: Path) -> None:
    """The rank says something of a decoder with low-rank branches, blocks of what is decomposed in them."""
    grid = {"method.decoder": ["full", "lora"], "method.rank": [2, 4]}
    path = write(tmp_path / "s.yaml", methods=[{"name": "adapter"}], grid=grid)
    assert labels(path) == ["decoder=full", "decoder=lora,rank=2", "decoder=lora,rank=4"]
    layers = {"neck": ["neck"], "both": ["neck", "linears"]}
    grid = {"method.layers": layers, "method.blocks": [[0], [1]]}
    path = write(tmp_path / "p.yaml", methods=[{"name": "sam_parser"}], grid=grid)
    assert labels(path) == ["layers=neck", "layers=both,blocks=0", "layers=both,blocks=1"]
    path = write(tmp_path / "b.yaml", methods=[{"name": "sam_parser+lora"}], grid={"method.blocks": [[0], [1]]})
    assert labels(path) == ["blocks=0", "blocks=1"]
    grid = {"method.scaling": {"alpha": "alpha/r", "none": "none"}, "method.alpha": [4.0, 8.0]}
    path = write(tmp_path / "a.yaml", methods=[{"name": "lora"}], grid=grid)
    assert labels(path) == ["scaling=alpha,alpha=4.0", "scaling=alpha,alpha=8.0", "scaling=none"]
    keys = {"method.decoder": ["full", "lora"], "method.rank": {"low": 2, "high": 8}}
    assert load_sweep(write(tmp_path / "t.yaml", methods=[{"name": "adapter"}], study={"keys": keys})).keys == (*keys,)


def test_a_learned_fusion_of_zero_shot_is_not_trained_and_has_no_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", fusion={"name": "learned"}, grid={"train.seed": [0, 1]})
    assert labels(path) == ["zero_shot", "seed=0", "seed=1"]
    segmenter = build_segmenter(
        *(ModelConfig(name="vit_nano", weights="random", image_size=64), MethodConfig(name="zero_shot")),
        *(FusionConfig(name="learned"), ["t1c", "t2f"], ["WT"], 0, choose_device("cpu")),
    )
    assert segmenter.trainable_groups() == {}


def test_methods_that_are_swept_are_called_by_their_plain_names(tmp_path: Path) -> None:
    path = write(tmp_path / "n.yaml", methods=[{"name": "lora"}], grid={"method.name": ["sam_parser + lora", " lora"]})
    assert labels(path) == ["method=sam_parser+lora", "method=lora"]


def test_labels_of_values_may_be_called_low_and_high(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", grid={"method.rank": {"low": 2, "middle": 4, "high": 8}})
    assert labels(path) == ["zero_shot", "rank=low", "rank=middle", "rank=high"]


def test_rounding_does_not_leave_a_range() -> None:
    narrow = RangeSection(low=0.9991, high=0.99951)
    assert [study._rounded(x, narrow) for x in (0.9991, 0.99921, 0.9995)] == [0.9991, 0.9991, 0.99951]
    assert [study._rounded(x, RangeSection(low=0, high=0.5)) for x in (0.0, 0.12345)] == [0.0, 0.123]
    assert study._rounded(1234, RangeSection(low=1, high=2000)) == 1234


def test_a_sweep_can_name_its_pipeline(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml")
    path = tmp_path / "s.yaml"
    path.write_text(
        yaml.safe_dump({"name": "mine", "pipeline": "base.yaml", "train": {"epochs": 3}, "grid": {"method.rank": [2]}})
    )
    sweep = load_sweep(path, ["train.batch_size=4"])
    train = grid_points(sweep)[1].method.config.train
    assert (sweep.pipeline.settings.name, train.epochs, train.slices_per_epoch, train.batch_size) == ("mine", 3, 4, 4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "give either grid or study"),
        ({"grid": {"method.rank": [2]}, "study": {"keys": {"method.rank": [2]}}}, "give either grid or study"),
        ({"grid": {"method.rnak": [2]}}, r"unknown key method\.rnak; did you mean method\.rank\?"),
        ({"grid": {"method.rank": 2}}, "needs a list of values"),
        ({"grid": {"method.rank": [2, "two"]}}, r"point method\.rank=two: method\.rank: .*integer"),
        ({"grid": {"method.rank": [2, 2]}}, r"two values of method\.rank are called 2"),
        ({"grid": {"method.tokens": [2]}}, r"no point reads method\.tokens"),
        (
            {"grid": {"evaluate.challenge": [None, "brats2023-gli"]}},
            r"evaluate\.challenge is swept, but all points are",
        ),
        ({"study": {"keys": {"evaluate.bootstrap": [100, 200]}}}, r"evaluate\.bootstrap is swept, but all points are"),
        ({"grid": {"train.regions": {"wt": ["WT"], "all": ["WT", "TC", "ET"]}}}, r"train\.regions.*cannot be compared"),
        ({"grid": {"predict.prompts": ["boxes", "none"]}}, r"predict\.prompts is swept.*cannot be compared"),
        (
            {"methods": [{"name": "lora"}], "grid": {"method.name": ["full", "lora"], "method.tokens": [2]}},
            r"no point reads method\.tokens",
        ),
        ({"study": {"keys": {"method.rank": [2, 4], "method.tokens": [2]}}}, r"no point reads method\.tokens"),
        ({"grid": {"method.rank": [2]}, "gird": 1}, "unknown key gird; did you mean grid"),
        ({"grid": {"method.rank": [2]}, "folds": 2, "score": "val"}, "folds have no validation cases"),
        ({"study": {"keys": {"method.rank": [2]}}, "score": "test"}, "cannot be judged on them any more"),
        ({"study": {"keys": {"train.lr": {"low": 1.0, "high": 0.1}}}}, "low must be below high"),
        ({"study": {"keys": {"train.lr": {"low": 0.0001, "high": -1, "log": True}}}}, "low must be below high"),
        ({"study": {"keys": {"method.rank": {"low": 0, "high": 8}}}}, r"point method\.rank=0"),
        ({"grid": {"method.name": ["lora", "full"]}}, "there are several methods"),
        ({"grid": {"method.rank": {"low": 2, "high": 8}}}, r"method\.rank has a range, which needs study"),
        ({"grid": {"train.lr": {"low": 1e-5, "high": 1e-3, "log": True}}}, r"train\.lr has a range, which needs study"),
        ({"grid": {"method.rank": {"a/b": 2}}}, "has a character that folders do not take"),
        ({"grid": {"method.alpha": [1.0, float("inf")]}}, r"point method\.alpha=inf: .*finite"),
        ({"study": {"keys": {"train.lr": {"low": 1e-5, "high": float("inf")}}}}, r"study\.keys\.train\.lr: .*finite"),
        ({"grid": {"method.blocks": [[0], [77]]}}, r"point blocks=77: method\.blocks names \[77\]"),
        ({"grid": {"method.dora": [False, True], "method.init": ["kaiming", "pissa"]}}, "point dora=true,init=pissa: "),
        ({"methods": [{"name": "lora"}], "grid": {"method.name": ["full", "lora+full"]}}, r"point method=lora\+full: "),
        ({"study": {"keys": {"method.blocks": [[0], [77]]}}}, r"point blocks=77: method\.blocks names \[77\]"),
        ({"methods": [{"name": "sd_trans"}], "grid": {"method.depth": [1, 2]}}, r"point depth=2: method\.depth is 2"),
        (
            {
                "methods": [{"name": "prompt_tokens"}],
                "predict": {"prompts": "none"},
                "grid": {"method.name": ["prompt_tokens", "lora"]},
            },
            "point method=lora: predict.prompts is none",
        ),
    ],
)
def test_bad_files_are_refused_whole(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_sweep(write(tmp_path / "s.yaml", **keys))
    assert caught.value.path == tmp_path / "s.yaml"


def test_a_key_cannot_be_swept_and_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank is swept and also set"):
        load_sweep(write(tmp_path / "s.yaml", grid={"method.rank": [2]}), ["method.rank=4"])


def test_a_dry_run_lists_the_points_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "s.yaml", grid=GRID)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", str(path), "--dry-run", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert (stop.value.code or 0) == 0 and not (tmp_path / "out").exists()
    assert lines[1].split() == ["pending", "rank=2,lr=mild"] and lines[-1].startswith(
        "5 points, scored on the split test"
    )


# ---------------------------------------------------------------- a grid
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of which two points fail, interrupted once and gone on with."""
    folder = tmp_path_factory.mktemp("sweep")
    path, out = write(folder / "s.yaml", grid=GRID), folder / "out"
    real = sweep_points.train_and_predict

    def interrupted(place: Any, method: Any, *rest: Any) -> None:
        if method.label.startswith("rank=4"):
            raise KeyboardInterrupt
        real(place, method, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_points, "train_and_predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep_file(path, [], out, device="cpu")
    assert [r["status"] for r in read(out / "sweep.csv")] == ["done", "done", "failed", "pending", "pending"]
    first = (out / "runs" / "rank=2,lr=mild" / "adapter.safetensors").stat().st_mtime_ns
    # Two at a time, so that points side by side are seen here too.
    assert sweep_file(path, [], out, device="cpu", jobs=2) == 1
    assert (out / "runs" / "rank=2,lr=mild" / "adapter.safetensors").stat().st_mtime_ns == first
    return out


def test_a_failing_point_is_recorded_and_the_others_go_on(finished: Path) -> None:
    rows = {r["point"]: r for r in read(finished / "sweep.csv")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "zero_shot": "done", "rank=2,lr=mild": "done", "rank=2,lr=wrong": "failed",
        "rank=4,lr=mild": "done", "rank=4,lr=wrong": "failed",
    }  # fmt: skip
    assert "the loss is" in rows["rank=4,lr=wrong"]["error"] and rows["rank=4,lr=wrong"]["WT_dice_mean"] == ""
    assert "Traceback" in (finished / "runs" / "rank=4,lr=wrong" / "error.txt").read_text()


def test_the_table_has_keys_scores_and_costs(finished: Path) -> None:
    rows = read(finished / "sweep.csv")
    assert list(rows[0]) == [
        *("point", "method.rank", "train.lr", "split", "n_cases", "WT_dice_mean", "WT_dice_low", "WT_dice_high"),
        *("trainable_parameters", "peak_memory_mib", "train_seconds", "seconds_per_step", "status", "error"),
    ]
    two, four = rows[1], rows[3]
    assert (two["method.rank"], two["train.lr"], two["split"]) == ("2", "mild", "test")
    cases = [r for r in read(finished / "runs" / two["point"] / "per_case.csv") if r["method"] != "filled_box"]
    assert int(two["n_cases"]) == len(cases)
    assert float(two["WT_dice_mean"]) == pytest.approx(sum(float(c["dice"]) for c in cases) / len(cases))
    # The decoder is frozen, so that the count is in proportion to the rank.
    assert int(four["trainable_parameters"]) == 2 * int(two["trainable_parameters"]) > 0
    record = json.loads((finished / "runs" / two["point"] / "run.json").read_text())
    # One epoch of 4 slices in batches of 2.
    assert record["updates"] == 2 and record["seconds_per_step"] == pytest.approx(record["train_seconds"] / 2)
    assert float(two["train_seconds"]) == record["train_seconds"] > 0 and float(two["peak_memory_mib"]) > 10
    assert rows[0]["trainable_parameters"] == "0" and rows[0]["seconds_per_step"] == ""


def test_points_share_what_was_prepared_and_are_ordinary_runs(finished: Path) -> None:
    assert len(list((finished / "prepared").glob("*/plan.json"))) == 1
    folder = finished / "runs" / "rank=4,lr=mild"
    assert {"adapter.safetensors", "config.yaml", "log.csv", "run.json", "predictions", "per_case.csv"} <= {
        path.name for path in folder.iterdir()
    }


def test_the_figure_comes_from_the_comparison(finished: Path) -> None:
    Image.open(finished / "sweep.png").verify()
    text = (finished / "sweep.svg").read_text()
    for words in (
        ">rank<",
        ">zero-shot: mean<",
        ">filled box (floor): mean<",
        ">peak memory (MiB)<",
        ">training time (s)<",
    ):
        assert words in text
    assert (finished / "comparison" / "sweep.svg").read_text() == text
    runs = {r["method"]: r for r in read(finished / "comparison" / "runs.csv")}
    assert {"zero_shot", "rank=2,lr=mild", "rank=4,lr=mild", "filled_box"} == set(runs)


def test_other_settings_run_a_point_anew_and_equal_ones_do_not(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.parent / "s.yaml"
    assert sweep_file(path, [], finished, device="cpu", dry_run=True) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        *("done", "done", "failed", "done", "failed")
    ]
    watched = [finished / "runs" / p / "point.json" for p in ("zero_shot", "rank=2,lr=mild", "rank=4,lr=mild")]
    before = [file.stat().st_mtime_ns for file in watched]
    small = write(finished.parent / "t.yaml", grid={"method.rank": [2, 4], "train.lr": {"mild": 1e-3}})
    assert sweep_file(small, [], finished, device="cpu") == 0
    assert [file.stat().st_mtime_ns for file in watched] == before
    assert [r["status"] for r in read(finished / "sweep.csv")] == ["done"] * 3


# ---------------------------------------------------------------- a study
def test_a_study_goes_on_where_it_stopped_and_sees_no_test_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optuna = pytest.importorskip("optuna", reason="optuna is not installed (extra `sweep`)")
    keys = {"method.rank": [2, 4], "train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    path, out = write(tmp_path / "s.yaml", study={"trials": 2, "keys": keys}), tmp_path / "out"
    assert sweep_file(path, [], out, device="cpu") == 0
    first = read(out / "sweep.csv")
    tables = {r["point"]: (out / "runs" / r["point"] / "per_case.csv").stat().st_mtime_ns for r in first}
    assert sweep_file(path, ["study.trials=3"], out, device="cpu") == 0
    assert all((out / "runs" / p / "per_case.csv").stat().st_mtime_ns == t for p, t in tables.items())
    rows = read(out / "sweep.csv")
    assert rows[: len(first)] == first and [r["split"] for r in rows] == ["val"] * len(rows)
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{out / 'study.db'}")
    assert len(study.trials) == 3 and study.direction.name == "MAXIMIZE"
    scores = {r["point"]: float(r["WT_dice_mean"]) for r in rows}
    assert study.best_value == pytest.approx(max(score for point, score in scores.items() if point != "zero_shot"))
    # What was predicted and scored are the validation cases.
    validation = {r["case_id"] for r in read(out / "manifest.csv") if r["split"] == "val"}
    for row in rows:
        folder = out / "runs" / row["point"]
        assert {r["case_id"] for r in read(folder / "per_case.csv")} == validation
        assert {p.name.removesuffix(".nii.gz") for p in folder.glob("predictions/*.nii.gz")} == validation
    # The best point, as an ordinary pipeline over the test cases.
    best = load_pipeline(out / "best.yaml")
    assert [m.label for m in best.methods] == ["zero_shot", "best"]
    chosen = best.methods[1].config
    assert f"rank={chosen.method.rank},lr={chosen.train.lr!r}" in scores and chosen.method.decoder == "frozen"
    assert best.settings.phantom is not None and best.settings.phantom.cases == 6
    assert "best on the validation cases: rank=" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="begun with other keys, settings, cases or seed"):
        sweep_file(path, ["train.batch_size=4"], out, device="cpu")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_fails_in_a_study_does_not_count_is_named_and_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna", reason="optuna is not installed (extra `sweep`)")
    keys = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    path, out = write(tmp_path / "s.yaml", study={"trials": 2, "keys": keys}), tmp_path / "out"
    real, script = sweep_points.train_and_predict, ["fail", "cases fail", "stop", "go on", "go on"]

    def scripted(place: Any, method: Any, *rest: Any) -> None:
        what = "go on" if method.label == "zero_shot" else script.pop(0)
        if what == "fail":
            raise DataError("a case is on a disk that is not there")
        if what == "stop":
            raise KeyboardInterrupt
        real(place, method, *rest)
        if what == "cases fail":
            place.failures.append(Finding("a", "", "out_of_memory", "error", "memory ran out", "Use less."))

    def states() -> list[str]:
        study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{out / 'study.db'}")
        return [trial.state.name for trial in study.trials]

    monkeypatch.setattr(sweep_points, "train_and_predict", scripted)
    # As many fail as are asked for: it ends, although none has a score.
    assert sweep_file(path, [], out, device="cpu") == 1
    assert states() == ["FAIL", "FAIL"] and len(script) == 3
    assert "trial 0 does not count: lr=" in caplog.text and "trial 1 does not count: lr=" in caplog.text
    assert "ends with 0 of 2 trials: 2 failed in this call" in caplog.text
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        sweep_file(path, [], out, device="cpu")
    assert states() == ["FAIL", "FAIL", "RUNNING"] and "failed before do not count: 0 (lr=" in caplog.text
    sweep_file(path, [], out, device="cpu")
    assert states() == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"] and script == []
    assert [r["status"] for r in read(out / "sweep.csv")] == ["done", "failed", "incomplete", "done", "done"]


def test_a_point_that_failed_is_not_run_twice_in_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed (extra `sweep`)")
    path = write(tmp_path / "s.yaml", methods=[{"name": "lora"}], study={"trials": 6, "keys": {"method.rank": [2, 4]}})
    tried: list[str] = []

    def failing(_: Any, method: Any, *rest: Any) -> None:
        tried.append(method.label)
        raise DataError("no weights are there")

    monkeypatch.setattr(sweep_points, "train_and_predict", failing)
    assert sweep_file(path, [], tmp_path / "out", device="cpu") == 1
    assert sorted(tried) == sorted(set(tried)) and not (tmp_path / "out" / "best.yaml").exists()
