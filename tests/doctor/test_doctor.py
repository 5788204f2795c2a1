"""The command: a healthy set-up from its settings alone, what it leaves, and how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medsam_lora import cli
from medsam_lora.config import build_config, load_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.doctor import CHECKS
from medsam_lora.doctor.diagnosis import diagnose, exit_code
from medsam_lora.doctor.result import fault
from medsam_lora.doctor.sources import Given, largest_slices
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.io.store import open_store
from medsam_lora.models.checkpoint import load_adapter, save_adapter
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.predict import predict
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import ADAPTER_FILE, train

KEYS = ["check", "status", "measured", "meaning", "remedy", "numbers"]
HEALTHY = """
name: healthy
phantom: {cases: 3, seed: 11, shape: [64, 76, 28]}
methods: [{name: zero_shot}, {name: lora, rank: 4}]
data: {modalities: [t1c, t2f]}
model: {name: vit_nano, image_size: 128}
train: {lr: 4.0e-4, lr_encoder: 4.0e-3, batch_size: 4}
"""


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "healthy.yaml"
    path.write_text(HEALTHY)
    return path


class Cohort:
    """Small phantom cases, settings for them, a store, and a run with its predictions."""

    def __init__(self, folder: Path) -> None:
        self.root, self.manifest, self.settings = folder / "cohort", folder / "m.csv", folder / "c.yaml"
        make_cohort(self.root, 3, 5, (48, 56, 20))
        build_manifest(self.root, self.manifest, {"train": 1.0, "val": 0.0, "test": 0.0}, 0)
        self.settings.write_text(
            "data: {modalities: [t2f]}\nmodel: {name: vit_nano, image_size: 64}\nmethod: {rank: 2}\n"
            "train: {epochs: 1, slices_per_epoch: 4}\n"
        )
        config = build_config(
            {
                "data": {"modalities": ["t2f"]},
                "model": {"name": "vit_nano", "image_size": 64},
                "method": {"rank": 2},
                "train": {"epochs": 1, "slices_per_epoch": 4},
            }
        )
        self.store, _ = prepare(self.manifest, self.root, folder / "prepared", config)
        self.run = folder / "run"
        train(self.manifest, self.store, self.run, config, device="cpu")
        predict(self.manifest, self.root, self.run, self.run / "predictions", config, device="cpu")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("doctor"))


def test_a_healthy_set_up_is_ok_throughout(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`medsam-lora doctor --config FILE` and no more: a pipeline says where its cases are."""
    code, out, _ = call(capsys, "doctor", "--config", pipeline, "--out", tmp_path / "out", "--device", "cpu")
    *lines, last = out.splitlines()
    assert code == 0 and last == "no fault found", out
    assert [line.split()[:2] for line in lines] == [["skipped" if c == "run" else "ok", c] for c in CHECKS]
    rows = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert [row["check"] for row in rows] == list(CHECKS) and all(list(row) == KEYS for row in rows)
    by_name = {row["check"]: row["numbers"] for row in rows}
    curve = by_name["overfit"]["curve"]
    assert curve[-1]["dice"] >= by_name["overfit"]["target"] > 0.9 and curve[-1]["loss"] < curve[0]["loss"]
    assert np.mean(by_name["base"]["dice"]) > np.mean(by_name["base"]["floor"])
    assert by_name["reload"]["difference"] <= 1e-5 and by_name["predict"]["differing"] == 0
    with Image.open(tmp_path / "out" / "doctor.png") as picture:
        assert picture.height > 4 * 300 and len(picture.convert("RGB").getcolors(10**6) or []) > 100
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["doctor.json", "doctor.png"]


def test_a_fault_ends_with_1_and_json_has_stable_keys(cohort: Cohort, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--manifest", cohort.manifest, "--root", cohort.root, "--config", cohort.settings, "--device", "cpu")
    words += ("--check", "settings", "--check", "labels", "--set", "method.decoder=frozen")
    code, out, _ = call(capsys, "doctor", *words, "--json")
    rows = json.loads(out)
    assert code == 1 and [list(row) for row in rows] == [KEYS, KEYS]
    assert [(row["check"], row["status"]) for row in rows] == [("settings", "FAULT"), ("labels", "ok")]
    assert rows[0]["remedy"] == "Set method.decoder=full."
    code, out, _ = call(capsys, "doctor", *words)
    first, second, last = out.splitlines()
    assert (
        code == 1
        and first.startswith("FAULT    settings  method lora")
        and first.endswith("Remedy: " + rows[0]["remedy"])
    )
    assert second.startswith("ok       labels") and last == "faults: settings"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--check", "boxes"), "unknown check 'boxes'; did you mean box?"),
        (("--manifest", "nowhere.csv"), "nowhere.csv"),
        (("--root", "nowhere"), "there are no data to look at"),
        (("--prepared", "nowhere"), "no prepared store is here"),
        (("--run", "nowhere"), "nowhere: no such run. Remedy: Give --run"),
        (("--run", "."), "no adapter is in this run"),
        (("--set", "method.name=lorra"), "unknown method 'lorra'"),
        (("--set", "train.lrr=1"), "did you mean train.lr?"),
        (("--method", "lora"), "this is no pipeline file"),
        (("--root", "nowhere", "--set", "model.weights=nothing.pt"), "there are no data"),
    ],
)
def test_unusable_input_ends_with_2(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "doctor", *words)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("name: s\npipeline: base.yaml\ngrid: {method.rank: [2, 4]}\n", "Give --config {folder}/base.yaml, and"),
        ("name: s\nphantom: {cases: 3}\nstudy: {keys: {method.rank: [2]}}\n", "Give a pipeline file of its other keys"),
        ("pipeline: base.yaml\ngrid: {method.rank: [2, 4]}\n", "Give --config {folder}/base.yaml, and"),
    ],
)
def test_a_sweep_file_is_refused_by_name(text: str, remedy: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    code, out, err = call(capsys, "doctor", "--config", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "this is a sweep file" in err and str(path) in err and remedy.format(folder=tmp_path) in err


def test_of_a_pipeline_any_method_can_be_examined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "three.yaml"
    path.write_text(HEALTHY.replace("rank: 4}]", "rank: 4}, {label: frozen, name: lora, decoder: frozen}]"))
    words = ("--config", path, "--check", "settings", "--device", "cpu")
    code, out, _ = call(capsys, "doctor", *words)
    assert code == 0 and "method lora, decoder full" in out
    code, out, _ = call(capsys, "doctor", *words, "--method", "frozen")
    assert code == 1 and "The mask decoder is frozen" in out
    code, _, err = call(capsys, "doctor", *words, "--method", "frozn")
    assert code == 2 and "did you mean frozen?" in err and "Choose of zero_shot, lora, frozen" in err


def test_cases_without_a_reference_cannot_be_examined(cohort: Cohort, tmp_path: Path, capsys: Any) -> None:
    blind = [
        type(r)(r.case_id, r.patient_id, "", {k: f for k, f in r.files.items() if k != "seg"}, r.label_convention, "")
        for r in read_manifest(cohort.manifest)
    ]
    write_manifest(tmp_path / "blind.csv", blind)
    code, _, err = call(capsys, "doctor", "--manifest", tmp_path / "blind.csv", "--root", cohort.root)
    assert code == 2 and "no case has a reference that shows tumour" in err


def test_a_store_alone_is_enough(cohort: Cohort) -> None:
    given = Given(config=cohort.settings, prepared=cohort.store)
    checks = ["labels", "input", "box", "way_back", "predict"]
    rows = {row["check"]: row for row in diagnose(given, only=checks, device="cpu")}
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "ok", "ok", "skipped"]
    assert "not at hand" in rows["labels"]["measured"] and "--manifest" in rows["predict"]["remedy"]
    assert "prediction" not in rows["box"]["measured"]


def test_the_slices_are_the_largest_of_every_case_in_turn(cohort: Cohort) -> None:
    cases = open_store(cohort.store)
    chosen = largest_slices(cases, 4)
    assert {s.case_id for s in chosen[:3]} == {case.case_id for case in cases}
    for one in chosen[:3]:
        case = next(c for c in cases if c.case_id == one.case_id)
        areas = [int((label > 0).sum()) for label in np.asarray(case.label)]
        assert one.ks == (case.ks[int(np.argmax(areas))],) and int((one.label > 0).sum()) == max(areas)
    sizes = [int((s.label > 0).sum()) for s in chosen]
    assert sizes[:3] == sorted(sizes[:3], reverse=True)


def test_a_run_is_examined_by_its_own_settings(cohort: Cohort) -> None:
    given = Given(run=cohort.run, manifest=cohort.manifest, root=cohort.root)
    (row,) = diagnose(given, only=["run"], device="cpu")
    assert row["status"] == "ok" and "0.00% of the voxels of 3 earlier predictions differ" in row["measured"]
    (row,) = diagnose(Given(run=cohort.run, prepared=cohort.store), only=["run"], device="cpu")
    assert row["status"] == "ok" and "not at hand" in row["measured"]


def test_a_run_whose_predictions_are_not_its_own_is_a_fault(cohort: Cohort) -> None:
    paths = sorted((cohort.run / "predictions").glob("*.nii.gz"))
    whole = [path.read_bytes() for path in paths]
    try:
        for path in paths:
            image = nib.load(path)
            moved = np.roll(np.asanyarray(image.dataobj), 4, axis=0)
            nib.save(nib.Nifti1Image(moved, image.affine, image.header), path)
        given = Given(run=cohort.run, manifest=cohort.manifest, root=cohort.root)
        (row,) = diagnose(given, only=["run"], device="cpu")
    finally:
        for path, data in zip(paths, whole, strict=True):
            path.write_bytes(data)
    assert row["status"] == "FAULT" and "not what its adapter predicts now" in row["meaning"]


STACKS = ("method.name=sd_trans", "method.depth=3", "train.lr=0.001", "train.lr_encoder=0.04")


def test_neighbours_of_the_slices_are_seen_as_predict_sees_them(cohort: Cohort, tmp_path: Path) -> None:
    """Two slices of a case are each other's neighbours; and a run's predictions had all the slices of the case."""
    two = read_manifest(cohort.manifest)[:2]
    write_manifest(tmp_path / "two.csv", two)
    given = Given(cohort.settings, STACKS, tmp_path / "two.csv", cohort.root)
    (row,) = diagnose(given, only=["predict"], device="cpu")
    assert (row["status"], row["numbers"]["differing"]) == ("ok", 0) and row["numbers"]["voxels"] > 100, row
    config = load_config(cohort.settings, STACKS)
    run = tmp_path / "run"
    train(cohort.manifest, cohort.store, run, config, device="cpu")
    predict(cohort.manifest, cohort.root, run, run / "predictions", config, device="cpu")
    (row,) = diagnose(Given(run=run, manifest=cohort.manifest, root=cohort.root), only=["run"], device="cpu")
    assert row["status"] == "ok" and "0.00% of the voxels of 3 earlier predictions differ" in row["measured"], row


def test_empty_masks_on_both_sides_decide_nothing(cohort: Cohort) -> None:
    given = Given(cohort.settings, ("predict.threshold=0.999999",), cohort.manifest, cohort.root)
    (row,) = diagnose(given, only=["predict"], device="cpu")
    assert (row["status"], row["numbers"]) == ("skipped", {"differing": 0, "voxels": 0}) and row["remedy"]
    assert "marks a voxel" in row["meaning"]


def test_predictions_cleaned_as_whole_volumes_are_not_compared_by_slices(cohort: Cohort, tmp_path: Path) -> None:
    """The slices alone are smaller than the least component that is kept, the whole tumour is not."""
    run = tmp_path / "run"
    shutil.copytree(cohort.run, run, ignore=shutil.ignore_patterns("predictions"))
    tensors, metadata = load_adapter(run / ADAPTER_FILE)
    image = nib.load(sorted((cohort.run / "predictions").glob("*.nii.gz"))[0])
    marked = int(np.count_nonzero(image.dataobj))
    least = 0.9 * marked * float(np.prod(image.header.get_zooms())) / 1000
    metadata["postprocess"] = {"WT": {"min_component_ml": least, "fill_holes": False}}
    save_adapter(run / ADAPTER_FILE, tensors, metadata)
    predict(cohort.manifest, cohort.root, run, run / "predictions", load_config(cohort.settings), device="cpu")
    (row,) = diagnose(Given(run=run, manifest=cohort.manifest, root=cohort.root), only=["run"], device="cpu")
    assert row["status"] == "ok" and "cleaned up as whole volumes and not compared" in row["measured"], row


def test_a_run_trained_with_other_settings_is_a_fault(cohort: Cohort) -> None:
    given = Given(
        cohort.settings, ("model.input_range=minmax",), manifest=cohort.manifest, root=cohort.root, run=cohort.run
    )
    (row,) = diagnose(given, only=["run"], device="cpu")
    assert row["status"] == "FAULT" and "model.input_range" in row["meaning"] and "config.yaml" in row["remedy"]


@pytest.mark.parametrize(
    ("method", "skipped"),
    [
        ("zero_shot", {"step", "moved"}),
        ("prompt_tokens", {"identity", "step", "merge"}),
        ("sd_trans", {"step", "merge"}),
    ],
)
def test_other_methods_are_examined_as_well(cohort: Cohort, method: str, skipped: set[str]) -> None:
    settings = (f"method.name={method}", *(["method.depth=3"] if method == "sd_trans" else []))
    given = Given(cohort.settings, settings, cohort.manifest, cohort.root)
    checks = ["input", "box", "way_back", "identity", "step", "moved", "reload", "merge", "predict"]
    rows = diagnose(given, only=checks, device="cpu")
    assert {r["check"]: r["meaning"] for r in rows if r["status"] == "FAULT"} == {}
    assert {r["check"] for r in rows if r["status"] == "skipped"} == skipped


def test_what_stops_a_check_is_a_finding_and_the_others_go_on(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("medsam_lora.training.loop.build_optimiser", broken)
    given = Given(cohort.settings, (), cohort.manifest, cohort.root)
    rows = diagnose(given, only=["settings", "moved"], device="cpu")
    assert [row["status"] for row in rows] == ["ok", "FAULT"] and "mat1 and mat2" in rows[1]["meaning"]
    assert exit_code(rows) == 1 and exit_code(rows[:1]) == 0


def test_a_bound_that_is_too_low_is_no_fault_and_said_at_the_end(
    cohort: Cohort, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--config", cohort.settings, "--manifest", cohort.manifest, "--root", cohort.root, "--device", "cpu")
    words += ("--set", "model.image_size=128", "--check", "overfit", "--check", "run", "--minutes", "0")
    code, out, _ = call(capsys, "doctor", *words)
    first, second, last = out.splitlines()
    assert code == 0 and first.startswith("skipped  overfit") and "Remedy: Give more (--steps, --minutes)" in first
    # That no run was given leaves nothing open.
    assert second.startswith("skipped  run") and last == "no fault found; not decided: overfit"


def test_rows_have_the_keys_that_are_promised() -> None:
    assert list(fault("a", "b", "c", d=1).row("e")) == KEYS


@pytest.mark.real_data
@pytest.mark.real_weights
def test_real_cases_under_a_real_model(
    brats_dir: Path, weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (weights_dir / "mobile_sam.pt").is_file():
        pytest.skip(f"no mobile_sam.pt in {weights_dir}")
    monkeypatch.setenv("MEDSAM_LORA_WEIGHTS_DIR", str(weights_dir))
    settings = ("model.name=vit_t", "model.image_size=256", "data.modalities=[t2f]", "method.name=decoder_only")
    checks = ["labels", "input", "box", "way_back", "base", "identity"]
    rows = diagnose(Given(settings=settings, root=brats_dir), only=checks, device="cpu")
    assert {row["check"]: row["status"] for row in rows} == dict.fromkeys(checks, "ok")
    numbers = rows[checks.index("base")]["numbers"]
    assert np.mean(numbers["dice"]) > np.mean(numbers["floor"])
