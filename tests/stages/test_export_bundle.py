"""``export --format monai-bundle``: MONAI's own commands on the exported folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from export_runs import BASE, run_folder
from monai.bundle import run as run_bundle
from monai.bundle import verify_metadata, verify_net_in_out

import medsam_lora
from medsam_lora.config import MethodConfig, build_config, dump_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.errors import AdapterError, ConfigError, DataError
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.io.predictions import read_record
from medsam_lora.stages import export_bundle
from medsam_lora.stages.bundle import BundleNetwork, CaseEvaluator, loaded
from medsam_lora.stages.export import export
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.predict import predict
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train

SCHEMA = Path(__file__).with_name("bundle_schema.json")

needs_bundle = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fire", "jsonschema")),
    reason="needs the extra 'bundle' (fire, jsonschema)",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of three regions, with tensors that follow from the base weights, and its bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    method = MethodConfig(name="lora", rank=2, init="pissa")
    run = run_folder(folder / "lora", method, fusion="learned", regions=("WT", "TC", "ET"))
    done = export(run, "monai-bundle", folder / "bundle")
    assert done["largest_difference"] == 0
    return run, folder / "bundle"


def monai_bundle(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    package = str(Path(medsam_lora.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "monai.bundle", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_folder_is_a_whole_bundle(exported: tuple[Path, Path]) -> None:
    _, bundle = exported
    files = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())
    assert files == sorted(
        [
            *("LICENSE", "configs/adapter.json", "configs/inference.json", "configs/metadata.json"),
            *("docs/README.md", "docs/export.json", "models/model.pt"),
        ]
    )
    assert "Apache License" in (bundle / "LICENSE").read_text()
    assert "not for patients" in (bundle / "docs" / "README.md").read_text()
    # Nothing of the machine it was made on.
    assert not [f for f in files if f.endswith(("json", "md")) and str(bundle.parent) in (bundle / f).read_text()]


@needs_bundle
def test_its_metadata_are_verified(exported: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = exported
    meta = bundle / "configs" / "metadata.json"
    found = monai_bundle("verify_metadata", "--meta_file", meta, "--filepath", SCHEMA, cwd=tmp_path)
    assert found.returncode == 0 and "metadata is verified with no error" in found.stdout + found.stderr
    broken = tmp_path / "metadata.json"
    broken.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "task"}))
    with pytest.raises(ValueError, match="'task' is a required property"):
        verify_metadata(meta_file=str(broken), filepath=str(SCHEMA))


def test_its_network_takes_and_gives_what_the_metadata_say(exported: tuple[Path, Path]) -> None:
    _, bundle = exported
    verify_net_in_out(
        "network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        device="cpu",
        bundle_root=str(bundle),
    )


@needs_bundle
def test_inference_gives_the_masks_of_predict(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, bundle = exported
    make_cohort(tmp_path / "cohort", 2, 5, (48, 56, 12))
    manifest = tmp_path / "manifest.csv"
    build_manifest(tmp_path / "cohort", manifest, {"train": 0.5, "val": 0.0, "test": 0.5}, 0)
    outcome = predict(
        manifest, tmp_path / "cohort", run, tmp_path / "ours", build_config({}), split="test", device="cpu"
    )
    (case,) = [record.case_id for record in read_manifest(manifest) if record.split == "test"]
    assert outcome.done == [case]
    options = {"manifest": manifest, "root": tmp_path / "cohort", "output_dir": tmp_path / "theirs", "split": "test"}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    found = monai_bundle("run", "--config_file", "configs/inference.json", *words, cwd=bundle)
    assert found.returncode == 0, found.stderr[-2000:]
    ours, theirs = (nib.load(tmp_path / who / f"{case}.nii.gz") for who in ("ours", "theirs"))
    assert np.array_equal(ours.affine, theirs.affine)
    ours_map, theirs_map = np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj)
    assert len(np.unique(ours_map)) > 1 and np.array_equal(ours_map, theirs_map)
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == sorted(
        [f"{case}.nii.gz", f"{case}.seg.nrrd", "prompts.csv", "record.json"]
    )
    assert (tmp_path / "theirs" / "prompts.csv").read_bytes() == (tmp_path / "ours" / "prompts.csv").read_bytes()
    record = read_record(tmp_path / "theirs")
    assert record.meanings == read_record(tmp_path / "ours").meanings and record.regions == ("WT", "TC", "ET")


def test_a_box_table_and_a_case_that_is_not_in_it(exported: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = exported
    make_cohort(tmp_path / "cohort", 2, 5, (48, 56, 12))
    manifest = tmp_path / "manifest.csv"
    build_manifest(tmp_path / "cohort", manifest, {"train": 0.5, "val": 0.0, "test": 0.5}, 0)
    first, second = (record.case_id for record in read_manifest(manifest))
    (tmp_path / "boxes.csv").write_text(f"case_id,k,i0,j0,i1,j1\n{first},6,16,20,30,38\n")
    network = loaded(BundleNetwork(bundle / "configs" / "adapter.json"), bundle / "models" / "model.pt")
    paths = str(manifest), str(tmp_path / "out"), str(tmp_path / "cohort"), str(tmp_path / "boxes.csv")
    with pytest.raises(DataError, match=f"1 of 2 cases failed .{second}"):
        CaseEvaluator(network, *paths).run()
    found = np.asanyarray(nib.load(tmp_path / "out" / f"{first}.nii.gz").dataobj)
    assert np.flatnonzero(found.any(axis=(0, 1))).tolist() in ([], [6])
    assert read_record(tmp_path / "out").prompt_source == "box_table"


@pytest.mark.parametrize("name", ["sd_trans", "prompt_tokens", "sam_parser+adapter"])
def test_methods_that_add_computation(name: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", MethodConfig(name=name, rank=2, bottleneck=2, tokens=2, depth=3))
    assert export(run, "monai-bundle")["largest_difference"] == 0
    assert (run / "export" / "monai-bundle" / "models" / "model.pt").is_file()


def test_uncropped_slices_on_the_unpadded_grid_with_a_threshold(tmp_path: Path) -> None:
    """Every plane has a frame of its own, which the network finds by itself; the threshold is the run's."""
    run = run_folder(
        tmp_path / "run", MethodConfig(name="lora", rank=2), BASE.model_copy(update={"grid": "unpadded"}), crop=None
    )
    (run / "config.yaml").write_text(dump_config(build_config({"predict": {"threshold": 0.7}})))
    out = Path(export(run, "monai-bundle")["out"])
    about = json.loads((out / "docs" / "export.json").read_text())
    assert about["input"]["frame"] is None and "that the slice reaches" in about["input"]["padding"]
    assert about["masks"]["threshold"] == 0.7
    assert json.loads((out / "configs" / "inference.json").read_text())["settings"]["threshold"] == 0.7


def test_another_run_s_weights_are_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = exported
    network = BundleNetwork(bundle / "configs" / "adapter.json")
    torch.save({"segmenter.x": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(AdapterError, match="not the weights of this bundle"):
        loaded(network, tmp_path / "model.pt")
    with pytest.raises(AdapterError, match="not the description of a bundle"):
        BundleNetwork(tmp_path / "adapter.json")


def test_a_bundle_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run", MethodConfig(name="lora", rank=2, init="pissa"), BASE)
    # What follows from the base weights is then made from the random ones.
    monkeypatch.setattr(export_bundle, "whole", lambda segmenter: segmenter)
    monkeypatch.setattr("medsam_lora.stages.bundle.whole", lambda segmenter: segmenter)
    monkeypatch.setattr(export_bundle, "BundleNetwork", _of_another_seed)
    with pytest.raises(AdapterError, match="rebuilt from the bundle differs"):
        export(run, "monai-bundle", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def _of_another_seed(adapter: Path) -> BundleNetwork:
    data = json.loads(adapter.read_text())
    data["model"]["seed"] = 5
    adapter.write_text(json.dumps(data))
    return BundleNetwork(adapter)


def test_a_method_with_a_prompt_of_its_own_needs_no_reference(tmp_path: Path) -> None:
    """As predict.prompts=none: the masks of every slice that shows brain, of cases without a reference."""
    settings = build_config(
        {
            "data": {"modalities": ["t1c", "t2f"]},
            "model": {"name": "vit_nano", "weights": "random", "image_size": 64},
            "method": {"name": "prompt_tokens"},
            "train": {"epochs": 1, "slices_per_epoch": 4, "batch_size": 2},
            "predict": {"prompts": "none"},
        }
    )
    manifest, root, bare = tmp_path / "manifest.csv", tmp_path / "cohort", tmp_path / "bare.csv"
    make_cohort(root, 2, 5, (32, 40, 12))
    build_manifest(root, manifest, {"train": 0.5, "val": 0.5}, 0)
    store, _ = prepare(manifest, root, tmp_path / "prepared", settings)
    train(manifest, store, tmp_path / "run", settings, device="cpu")
    records = [
        dataclasses.replace(r, files={k: v for k, v in r.files.items() if k != "seg"}) for r in read_manifest(manifest)
    ]
    write_manifest(bare, records)
    outcome = predict(bare, root, tmp_path / "run", tmp_path / "ours", settings, device="cpu")
    bundle = Path(export(tmp_path / "run", "monai-bundle")["out"])
    # The run's own setting, which the command's arguments replace.
    config = bundle / "configs" / "inference.json"
    assert json.loads(config.read_text())["settings"]["prompts"] == "none"
    words = {"bundle_root": str(bundle), "manifest": str(bare), "root": str(root)}
    run_bundle(run_id="run", config_file=str(config), output_dir=str(tmp_path / "theirs"), **words)
    for case in outcome.done:
        ours, theirs = (np.asanyarray(nib.load(tmp_path / at / f"{case}.nii.gz").dataobj) for at in ("ours", "theirs"))
        assert np.array_equal(ours, theirs)
    assert len(outcome.done) == 2
    assert (tmp_path / "theirs" / "prompts.csv").read_bytes() == (tmp_path / "ours" / "prompts.csv").read_bytes()
    record = json.loads((tmp_path / "theirs" / "record.json").read_text())
    assert (record["prompt_source"], record["predict"]["prompts"]) == ("none", "none")
    network = loaded(BundleNetwork(bundle / "configs" / "adapter.json"), bundle / "models" / "model.pt")
    with pytest.raises(DataError, match="2 of 2 cases failed"):
        CaseEvaluator(network, str(bare), str(tmp_path / "boxed"), str(root)).run()
    assert json.loads((tmp_path / "boxed" / "record.json").read_text())["prompt_source"] == "reference_box"
    readme = (bundle / "docs" / "README.md").read_text()
    assert "prompted by a box" not in readme and "--settings#prompts boxes" in readme
    assert "prompted by boxes" not in json.loads((bundle / "configs" / "metadata.json").read_text())["task"]


def test_no_prompt_is_refused_where_the_method_goes_by_them(exported: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = exported
    make_cohort(tmp_path / "cohort", 1, 5, (48, 56, 12))
    manifest = tmp_path / "manifest.csv"
    build_manifest(tmp_path / "cohort", manifest, {"test": 1.0}, 0)
    network = BundleNetwork(bundle / "configs" / "adapter.json")
    paths = str(manifest), str(tmp_path / "out"), str(tmp_path / "cohort")
    with pytest.raises(ConfigError, match="lora goes by prompts"):
        CaseEvaluator(network, *paths, settings={"prompts": "none"}).run()
    with pytest.raises(ConfigError, match="boxes was given beside prompts: none"):
        CaseEvaluator(network, *paths, boxes=str(tmp_path / "b.csv"), settings={"prompts": "none"}).run()
    assert not (tmp_path / "out").exists()
    assert "prompted by a box" in (bundle / "docs" / "README.md").read_text()
