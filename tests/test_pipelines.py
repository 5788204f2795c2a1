"""Every pipeline file is checked whole, and the main job runs from cohort to summary at toy size."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from medsam_lora.config import load_config
from medsam_lora.errors import ConfigError, ManifestError
from medsam_lora.io.tables import CHALLENGE_COLUMNS, PER_CASE_COLUMNS, SUMMARY_COLUMNS
from medsam_lora.peft import METHODS
from medsam_lora.stages.pipeline import check_methods, load_pipeline, parse_pipeline
from medsam_lora.stages.run import run, run_file
from medsam_lora.stages.sweep import sweep_file
from medsam_lora.stages.sweep_file import grid_points, load_sweep

CHECKOUT = Path(__file__).resolve().parent.parent
# The recipe of vit_nano is for `pretrain`, not for `run`; tests/stages/test_pretrain.py reads it.
FILES = sorted(path for path in (CHECKOUT / "pipelines").glob("*.yaml") if not path.name.startswith("pretrain_"))
SWEEPS = [path for path in FILES if {"grid", "study"} & set(yaml.safe_load(path.read_text()))]
PIPELINES = [*(path for path in FILES if path not in SWEEPS), CHECKOUT / "medsam_lora" / "stages" / "demo.yaml"]

TINY = {
    "name": "tiny",
    "phantom": {"cases": 6, "seed": 3, "shape": [48, 56, 20]},
    "split": {"train": 0.5, "val": 0.2, "test": 0.3, "seed": 0},
    "methods": [{"name": "zero_shot"}, {"name": "lora", "rank": 2}],
    "model": {"name": "vit_nano", "weights": "random", "image_size": 64},
    "train": {"epochs": 1, "slices_per_epoch": 8, "batch_size": 4, "lr": 1e-3},
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.name)
def test_every_pipeline_file_is_valid(path: Path) -> None:
    pipeline = load_pipeline(path)
    assert pipeline.settings.description
    assert all(set(method.config.method.name.split("+")) <= set(METHODS) for method in pipeline.methods)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_every_sweep_file_is_valid(path: Path, tmp_path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.pipeline.settings.description and sweep.split == "test"
    points = grid_points(sweep)
    assert points[0].label == "zero_shot" and len({p.label for p in points}) == len(points)
    # Seeds apart, nothing but what is swept differs between the points of a method.
    for key in sweep.keys:
        section, name = key.split(".")
        assert {getattr(getattr(p.method.config, section), name) for p in points} >= set(sweep.choices[key].values())
    data = yaml.safe_load(path.read_text())
    wrong = tmp_path / path.name
    wrong.write_text(yaml.safe_dump({**data, "train": {**data["train"], "epoch": 3}}))
    with pytest.raises(ConfigError, match=r"train\.epoch\b.*did you mean train\.epochs"):
        load_sweep(wrong)
    wrong.write_text(yaml.safe_dump({**data, "grid": {"method.ranks": [4]}}))
    with pytest.raises(ConfigError, match=r"unknown key method\.ranks; did you mean method\.rank"):
        load_sweep(wrong)


def test_the_sweeps_are_of_what_they_say() -> None:
    assert [path.stem for path in SWEEPS] == ["rank_phantom", "rank_sweep", "slicing_sweep"]
    synthetic, ranks, slicings = (grid_points(load_sweep(path)) for path in SWEEPS)
    assert len(synthetic) == 3 * 2 * 2 + 1
    assert {p.method.config.train.clip_norm for p in synthetic} == {None}
    lora = [p.method.config.method for p in ranks if p.method.config.method.name == "lora"]
    assert {(m.rank, m.scaling, m.alpha) for m in lora} == {
        (rank, scaling, 8.0) for rank in (4, 8, 16, 32, 64) for scaling in ("alpha/r", "alpha/sqrt(r)", "none")
    }
    assert len(lora) == 45 and len(ranks) == 45 + 3 + 1
    trained = [p for p in slicings if p.label != "zero_shot"]
    assert {p.method.config.slicing.name for p in trained} == {"full", "every_second", "random", "max_slice"}
    # Equal updates: what an epoch draws does not depend on how many slices there are.
    assert len({(p.method.config.train.epochs, p.method.config.train.slices_per_epoch) for p in trained}) == 1
    assert all(p.method.config.train.slices_per_epoch for p in trained)


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.name)
def test_a_misspelt_key_names_the_right_one(path: Path) -> None:
    data = yaml.safe_load(path.read_text())
    with pytest.raises(ConfigError, match=r"train\.epoch\b.*did you mean train\.epochs"):
        parse_pipeline({**data, "train": {**data["train"], "epoch": 3}})
    with pytest.raises(ConfigError, match="unknown key method_s; did you mean methods"):
        parse_pipeline({**data, "method_s": []})


def test_settings_reach_every_method_and_win_over_the_file() -> None:
    pipeline = parse_pipeline(TINY, ["train.epochs=7", "method.rank=5", "phantom.cases=4"])
    assert [m.config.train.epochs for m in pipeline.methods] == [7, 7]
    assert pipeline.methods[1].config.method.rank == 5
    assert pipeline.settings.phantom is not None and pipeline.settings.phantom.cases == 4


def test_a_method_name_chooses_among_the_methods() -> None:
    assert [m.label for m in parse_pipeline(TINY, ["method.name=lora"]).methods] == ["lora"]
    assert [m.label for m in parse_pipeline(TINY, ["method.name=full"]).methods] == ["full"]


def test_an_entry_may_change_whole_sections_and_labels_must_differ() -> None:
    entries = [{"name": "lora"}, {"name": "lora", "label": "lora_slow", "train": {"lr": 1e-5}}]
    pipeline = parse_pipeline({**TINY, "methods": entries})
    assert [m.config.train.lr for m in pipeline.methods] == [1e-3, 1e-5]
    with pytest.raises(ConfigError, match="two methods are called 'lora'"):
        parse_pipeline({**TINY, "methods": [{"name": "lora"}, {"name": "lora", "rank": 2}]})


@pytest.mark.parametrize("label", ["", ".", "..", "a/b", "../../escaped", "/tmp/a", "a\\b", "lora\n", ".hidden"])
def test_a_label_is_the_plain_name_of_a_folder(label: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be the name of its folder") as caught:
        parse_pipeline({**TINY, "methods": [{"name": "lora", "label": label}]}, path=Path("p.yaml"))
    assert caught.value.path == Path("p.yaml") and "letters, digits" in (caught.value.remedy or "")


def test_a_label_may_have_a_plus_and_not_the_name_of_the_floor() -> None:
    entries = [{"name": "lora", "label": "lora+x"}, {"name": "sam_parser + lora"}]
    assert [m.label for m in parse_pipeline({**TINY, "methods": entries}).methods] == ["lora+x", "sam_parser+lora"]
    with pytest.raises(ConfigError, match="'filled_box', as the floor"):
        parse_pipeline({**TINY, "methods": [{"name": "lora", "label": "filled_box"}]}, path=Path("p.yaml"))


def test_a_method_is_chosen_however_its_name_is_spaced() -> None:
    data = {**TINY, "methods": [{"name": "sam_parser + lora", "rank": 3}, {"name": "lora"}]}
    (method,) = parse_pipeline(data, ["method.name=sam_parser+lora"]).methods
    assert (method.label, method.config.method.rank) == ("sam_parser+lora", 3)


UNUSABLE = [
    ({"name": "lora+full"}, "lora and full cannot be combined"),
    ({"name": "lora", "dora": True, "init": "pissa"}, "exclude each other"),
    ({"name": "lora", "init": "pissa", "rank": 500}, "192 singular values"),
    ({"name": "lora", "blocks": [77]}, r"names \[77\]"),
    ({"name": "sd_trans", "depth": 2}, r"method\.depth is 2"),
    ({"name": "sam_parser", "layers": ["neck", "neck"]}, "names a layer twice"),
    ({"name": "lora", "model": {"image_size": 100}}, "multiple of 16"),
    ({"name": "lora", "model": {"grid": "unpadded", "attention": "reference"}}, r"model\.attention=reference"),
]


@pytest.mark.parametrize(("entry", "words"), UNUSABLE)
def test_a_method_that_does_not_suit_its_model_is_refused_before_any_work(
    entry: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({**TINY, "methods": [{"name": "zero_shot"}, {**entry, "label": "odd"}]}))
    with pytest.raises(ConfigError, match=f"method odd: .*{words}") as caught:
        run_file(path, [], tmp_path / "out", device="cpu")
    assert caught.value.path == path and caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_every_pipeline_of_the_package_can_be_attached() -> None:
    for path in PIPELINES:
        check_methods(load_pipeline(path).methods, path)


@pytest.mark.parametrize(("share", "split"), [("test", "test"), ("train", "train")])
def test_a_split_without_cases_is_refused_before_any_training(
    finished: Path, tmp_path: Path, share: str, split: str
) -> None:
    shares = {"train": 0.5, "val": 0.5, "test": 0.5, share: 0.0}
    data = {**TINY, "phantom": None, "root": str(finished / "cohort"), "split": {**shares, "seed": 0}}
    with pytest.raises(ManifestError, match=f"in the split {split}, so there is nothing to"):
        run(parse_pipeline(data), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "prepared").exists() and not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize("folds", [None, 2])
def test_what_is_fitted_needs_validation_cases_before_any_training(
    finished: Path, tmp_path: Path, folds: int | None
) -> None:
    methods = [{"name": "decoder_only"}, {"name": "lora", "train": {"postprocess": "fitted"}}]
    split = {"train": 0.7, "val": 0.0, "test": 0.3, "seed": 0}
    data = {**TINY, "phantom": None, "root": str(finished / "cohort"), "split": split, "folds": folds}
    with pytest.raises(ManifestError, match=r"fitted \(of lora\) needs validation cases"):
        run(parse_pipeline({**data, "methods": methods}), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "prepared").exists()


def test_what_methods_must_share_is_not_set_for_one_of_them() -> None:
    own_scores = {"name": "a", "methods": [{"name": "lora", "evaluate": {"challenge": "brats2023-gli"}}]}
    with pytest.raises(ConfigError, match="the method lora has a section evaluate of its own"):
        parse_pipeline(own_scores)
    # Said twice is no harm: a study writes out all settings of the best point.
    parse_pipeline({**own_scores, "evaluate": {"challenge": "brats2023-gli"}})
    tokens = {"name": "prompt_tokens", "predict": {"prompts": "none"}}
    with pytest.raises(ConfigError, match="differs between the methods"):
        parse_pipeline({"name": "a", "methods": [tokens, {"name": "zero_shot"}]})
    with pytest.raises(ConfigError, match="zero_shot goes by prompts"):
        parse_pipeline({"name": "a", "predict": {"prompts": "none"}, "methods": [{"name": "zero_shot"}]})
    assert parse_pipeline({"name": "a", "methods": [tokens]}).methods[0].config.predict.prompts == "none"


def test_an_unknown_method_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora"):
        run(parse_pipeline({**TINY, "methods": [{"name": "lorra"}]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "out"
    assert run(parse_pipeline(TINY), out, device="cpu") == 0
    return out


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    assert {p.name for p in (finished / "runs").iterdir()} == {"filled_box", "zero_shot", "lora"}
    for method in ("zero_shot", "lora"):
        folder = finished / "runs" / method
        assert (folder / "adapter.safetensors").is_file() and (folder / "log.csv").is_file()
        assert load_config(folder / "config.yaml").method.name == method
        rows = read(folder / "per_case.csv")
        assert list(rows[0]) == list(PER_CASE_COLUMNS)
        assert {r["method"] for r in rows} == {method} and {r["prompt_source"] for r in rows} == {"reference_box"}
    summary = read(finished / "summary.csv")
    assert list(summary[0]) == list(SUMMARY_COLUMNS)
    assert [r["method"] for r in summary] == ["filled_box", "zero_shot", "lora"]
    assert (finished / "overview.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (finished / "cohort").iterdir() if p.is_dir())
    assert set(json.loads((finished / "run.json").read_text())["stage_seconds"]) >= {"evaluate", "compare"}
    pairs = {(r["method"], r["baseline"]) for r in read(finished / "comparison" / "statistics.csv")}
    assert ("lora", "zero_shot") in pairs and ("lora", "filled_box") in pairs
    page = (finished / "report.html").read_text()
    assert all(r["case_id"] in page for r in read(finished / "runs" / "lora" / "per_case.csv"))


def test_a_pipeline_scores_three_regions_as_a_challenge_does(tmp_path: Path) -> None:
    train = {**TINY["train"], "regions": ["WT", "TC", "ET"], "cache_gib": 0.1}
    data = {**TINY, "train": train, "evaluate": {"challenge": "brats2023-men"}}
    data["methods"] = [{"name": "zero_shot"}, {"name": "decoder_only"}]
    out = tmp_path / "out"
    assert run(parse_pipeline(data), out, device="cpu") == 0
    for method in ("filled_box", "zero_shot", "decoder_only"):
        rows = read(out / "runs" / method / "per_case.csv")
        assert list(rows[0]) == [*PER_CASE_COLUMNS, *CHALLENGE_COLUMNS]
        assert {r["region"] for r in rows} == {"WT", "TC", "ET"} and {r["challenge"] for r in rows} == {"brats2023-men"}
    # Both methods leave the encoder as it is: every slice was embedded once for both.
    assert list((out / "cache").rglob("*.npy"))
    scores = {r["metric"] for r in read(out / "comparison" / "statistics.csv")}
    assert {"dice", "lesionwise_dice", "hd95_mm"} <= scores


def test_stages_after_evaluate_can_be_left_out(tmp_path: Path) -> None:
    data = {**TINY, "stages": ["verify", "prepare", "train", "predict", "evaluate"], "methods": [{"name": "zero_shot"}]}
    assert run(parse_pipeline(data), tmp_path / "out", device="cpu") == 0
    assert (tmp_path / "out" / "summary.csv").is_file()
    assert not (tmp_path / "out" / "comparison").exists() and not (tmp_path / "out" / "report.html").exists()


def test_the_summary_is_the_mean_of_the_cases(finished: Path) -> None:
    for row in read(finished / "summary.csv"):
        cases = read(finished / "runs" / row["method"] / "per_case.csv")
        assert int(row["n_cases"]) == len(cases) > 0
        assert float(row["dice_mean"]) == pytest.approx(np.mean([float(c["dice"]) for c in cases]), abs=1e-12)
        assert float(row["dice_low"]) <= float(row["dice_mean"]) <= float(row["dice_high"])


def test_predictions_stand_on_the_native_grid_of_the_test_cases(finished: Path) -> None:
    test_cases = {r["case_id"]: r for r in read(finished / "manifest.csv") if r["split"] == "test"}
    folder = finished / "runs" / "lora" / "predictions"
    assert {p.name.removesuffix(".nii.gz") for p in folder.glob("*.nii.gz")} == set(test_cases)
    for case_id, row in test_cases.items():
        reference = nib.load(finished / "cohort" / row["seg"])
        prediction = nib.load(folder / f"{case_id}.nii.gz")
        assert prediction.shape == reference.shape
        np.testing.assert_array_equal(prediction.affine, reference.affine)
        assert prediction.get_data_dtype() == np.uint8
        assert int(prediction.header["qform_code"]) > 0 and int(prediction.header["sform_code"]) > 0
        np.testing.assert_allclose(prediction.get_qform(), reference.affine, atol=1e-5)
        assert set(np.unique(np.asanyarray(prediction.dataobj))) <= {0, 1}


def test_a_second_run_trains_and_predicts_nothing_again(finished: Path) -> None:
    watched = [
        finished / "runs" / "lora" / "adapter.safetensors",
        *(finished / "runs" / "lora").glob("predictions/*.nii.gz"),
    ]
    before = {p: p.stat().st_mtime_ns for p in watched}
    assert run(parse_pipeline(TINY), finished, device="cpu") == 0
    assert {p: p.stat().st_mtime_ns for p in watched} == before


def test_from_a_stage_does_that_stage_and_the_later_ones_only(finished: Path) -> None:
    adapter = finished / "runs" / "lora" / "adapter.safetensors"
    before = adapter.stat().st_mtime_ns
    (finished / "summary.csv").unlink()
    assert run(parse_pipeline(TINY), finished, start="evaluate", device="cpu") == 0
    assert (finished / "summary.csv").is_file() and adapter.stat().st_mtime_ns == before
    with pytest.raises(ManifestError, match="--from takes one of"):
        run(parse_pipeline(TINY), finished, start="pepare", device="cpu")


def test_a_broken_case_is_listed_and_the_rest_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(parse_pipeline(TINY, ["pipeline.stages=[verify]"]), out, device="cpu") == 0
    victim = sorted((out / "cohort").iterdir())[0]
    path = next(victim.glob("*-t1c.nii.gz"))
    path.write_bytes(path.read_bytes()[:2000])
    cohort = {**TINY, "phantom": None, "root": str(out / "cohort"), "methods": [{"name": "zero_shot"}]}
    assert run(parse_pipeline(cohort), tmp_path / "second", device="cpu") == 1
    failures = read(tmp_path / "second" / "failures.csv")
    assert {f["case_id"] for f in failures} == {victim.name}
    assert victim.name not in {r["case_id"] for r in read(tmp_path / "second" / "manifest.csv")}
    assert (tmp_path / "second" / "summary.csv").is_file()


def test_a_patient_in_two_splits_is_left_out_and_the_rest_goes_on(finished: Path, tmp_path: Path) -> None:
    rows = [{**r, "split": "test" if r["split"] == "val" else r["split"]} for r in read(finished / "manifest.csv")]
    twice = next(r for r in rows if [o["patient_id"] for o in rows].count(r["patient_id"]) > 1)
    other = "train" if twice["split"] == "test" else "test"
    rows = [{**r, "split": other} if r["case_id"] == twice["case_id"] else r for r in rows]
    with (tmp_path / "m.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    data = {**TINY, "phantom": None, "methods": [{"name": "zero_shot"}]}
    data |= {"root": str(finished / "cohort"), "manifest": str(tmp_path / "m.csv")}
    assert run(parse_pipeline(data), tmp_path / "out", device="cpu") == 1
    failures = read(tmp_path / "out" / "failures.csv")
    assert {f["code"] for f in failures} == {"patient_in_two_splits"}
    kept = {r["patient_id"] for r in read(tmp_path / "out" / "manifest.csv")}
    assert kept and twice["patient_id"] not in kept


def test_folds_score_every_case_once_by_a_model_that_did_not_see_it(tmp_path: Path) -> None:
    data = {**TINY, "folds": 3, "methods": [{"name": "lora", "rank": 2}], "train": {**TINY["train"], "select": "last"}}
    out = tmp_path / "out"
    assert run(parse_pipeline(data), out, device="cpu") == 0
    rows = read(out / "runs" / "lora" / "per_case.csv")
    cases = [r["case_id"] for r in read(out / "manifest.csv")]
    assert sorted(r["case_id"] for r in rows) == sorted(cases)
    for f in range(3):
        dealt = read(out / "folds" / f"fold{f}.csv")
        trained = {r["patient_id"] for r in dealt if r["split"] == "train"}
        scored = {r["patient_id"] for r in rows if r["run"] == f"lora/fold{f}"}
        assert scored and not trained & scored
    assert {r["fold"] for r in read(out / "runs" / "lora" / "log.csv")} == {"fold0", "fold1", "fold2"}


def test_the_thesis_setting_runs_at_tiny_size(tmp_path: Path) -> None:
    """Its own file, its own stages and crop; only the cohort, the model and the amount of work are small."""
    path = tmp_path / "men.yaml"
    data = yaml.safe_load((CHECKOUT / "pipelines" / "brats_men_lora.yaml").read_text())
    path.write_text(yaml.safe_dump({**data, "phantom": {"cases": 8, "shape": [120, 120, 16]}}))
    settings = [
        "model.name=vit_nano",
        "model.weights=random",
        "model.image_size=64",
        "method.rank=4",
        "train.epochs=1",
        "train.amp=none",
        "predict.amp=none",
    ]
    assert run_file(path, settings, tmp_path / "out", device="cpu") == 0
    assert [r["method"] for r in read(tmp_path / "out" / "summary.csv")] == [
        "filled_box",
        "zero_shot",
        "decoder_only",
        "lora",
        "lora_rate_x10",
        "lora_frozen_decoder",
    ]
    store = next((tmp_path / "out" / "prepared").glob("*/plan.json"))
    assert json.loads(store.read_text())["crop"]["size"] == [138, 202]


SMALL = [
    *("model.name=vit_nano", "model.weights=random", "model.image_size=64", "train.epochs=1"),
    *("train.amp=none", "predict.amp=none", "train.batch_size=2", "predict.batch_size=16"),
]


def test_the_slicing_sweep_makes_equal_updates_at_tiny_size(tmp_path: Path) -> None:
    """Its own file; the cohort, the model and the amount of work are small, and there is one seed."""
    path = tmp_path / "slicing_sweep.yaml"
    data = yaml.safe_load((CHECKOUT / "pipelines" / "slicing_sweep.yaml").read_text())
    data |= {"phantom": {"cases": 6, "seed": 3, "shape": [48, 56, 20]}, "split": TINY["split"]}
    data["grid"] = {"slicing.name": ["full", "max_slice"]}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    out = tmp_path / "out"
    assert sweep_file(path, [*SMALL, "train.slices_per_epoch=8", "method.rank=2"], out, device="cpu") == 0
    records = {
        name: json.loads((out / "runs" / name / "run.json").read_text())
        for name in ("slicing=full", "slicing=max_slice")
    }
    # Three training cases have three largest slices, drawn again until there are eight.
    assert {name: record["updates"] for name, record in records.items()} == dict.fromkeys(records, 4)
    stores = {record["store"] for record in records.values()}
    assert len(stores) == 2
    assert (out / "sweep.png").is_file() and (out / "comparison" / "costs.png").is_file()


def test_every_method_of_the_comparison_runs_at_tiny_size(tmp_path: Path) -> None:
    """All of `methods_real_vit_t.yaml`, on a synthetic cohort in one split."""
    path = tmp_path / "methods.yaml"
    data = yaml.safe_load((CHECKOUT / "pipelines" / "methods_real_vit_t.yaml").read_text())
    del data["folds"]
    path.write_text(
        yaml.safe_dump({**data, "phantom": {"cases": 6, "seed": 3, "shape": [40, 48, 12]}, "split": TINY["split"]})
    )
    stages = "pipeline.stages=[verify,prepare,train,predict,evaluate]"
    settings = [*SMALL, "train.slices_per_epoch=2", "evaluate.bootstrap=100", "evaluate.challenge=null", stages]
    assert run_file(path, settings, tmp_path / "out", device="cpu") == 0
    scored = [row["method"] for row in read(tmp_path / "out" / "summary.csv")]
    assert scored == [
        *(
            "filled_box",
            "zero_shot",
            "decoder_only",
            "lora_r4",
            "lora_r16",
            "lora_r64",
            "lora_r16_unscaled",
            "lora_r64_unscaled",
            "lora_r16_rate_x10",
        ),
        *("adapter", "prefix", "sam_parser", "sam_parser_lora_r16", "full"),
    ]
    records = {name: json.loads((tmp_path / "out" / "runs" / name / "run.json").read_text()) for name in scored[1:]}
    count = {name: record["trainable_parameters"] for name, record in records.items()}
    decoder = count["decoder_only"]
    assert count["zero_shot"] == 0 and count["lora_r64"] - decoder == 16 * (count["lora_r4"] - decoder) > 0
    assert count["lora_r64_unscaled"] == count["lora_r64"]
    assert count["sam_parser_lora_r16"] - decoder == (count["sam_parser"] - decoder) + (count["lora_r16"] - decoder)
    assert count["full"] == max(count.values())
    settings = load_config(tmp_path / "out" / "runs" / "lora_r16_unscaled" / "config.yaml").method
    assert (settings.rank, settings.scaling) == (16, "none")
    # The encoder alone has ten times the rate.
    fast = load_config(tmp_path / "out" / "runs" / "lora_r16_rate_x10" / "config.yaml").train
    assert fast.lr_encoder == pytest.approx(10 * fast.lr) and fast.lr == 2.0e-4
