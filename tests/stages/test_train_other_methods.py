"""Methods with learning rates, prompts and layers of their own, through the stages and back from their files."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medsam_lora.config import Config, PredictConfig, SlicingConfig, build_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.errors import ConfigError, TrainingError
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.models.checkpoint import load_adapter
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.predict import predict
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train
from medsam_lora.training.loop import Trainer

SETTINGS = {
    "data": {"modalities": ["t1c", "t2f"]},
    "model": {"name": "vit_nano", "weights": "random", "image_size": 64},
    "train": {"epochs": 1, "slices_per_epoch": 4, "batch_size": 2, "lr": 1e-3},
}


def config(**method: object) -> Config:
    return build_config({**SETTINGS, "method": method})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder / "cases", 3, 5, (32, 40, 12))
    manifest = folder / "manifest.csv"
    build_manifest(folder / "cases", manifest, {"train": 0.6, "val": 0.4}, 0)
    store, outcome = prepare(manifest, folder / "cases", folder / "prepared", config(name="lora"))
    assert not outcome.failed
    return manifest, folder / "cases", store


def test_memory_that_runs_out_is_one_clear_error(
    cohort: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _, store = cohort

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Trainer, "_forward_backward", full)
    with pytest.raises(TrainingError, match=r"with 2 slices of 2 modalities.*train\.batch_size.*info --plan"):
        train(manifest, store, tmp_path / "run", config(name="lora", rank=2), device="cpu")


def test_a_missing_compiler_is_one_clear_error(
    cohort: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    manifest, _, store = cohort
    torch.compiler.reset()
    # What was compiled before would be found there, without a compiler.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    settings = {**SETTINGS, "method": {"name": "lora"}, "train": {**SETTINGS["train"], "compile": True}}
    # Not monkeypatch: what it sets back it deletes from torch's configuration.
    without = inductor.patch({"cpp.cxx": (None, "/no/such/compiler")})
    with without, pytest.raises(TrainingError, match=r"torch\.compile failed: .*train\.compile=false"):
        train(manifest, store, tmp_path / "run", build_config(settings), device="cpu")
    torch.compiler.reset()


def test_what_needs_no_prompt_predicts_without_a_reference(cohort: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A patient's case: no reference, no boxes; every slice that shows brain, and the same mask whatever the boxes."""
    manifest, root, store = cohort
    chosen = config(name="prompt_tokens")
    run = tmp_path / "run"
    train(manifest, store, run, chosen, device="cpu")
    records = [
        dataclasses.replace(r, files={k: v for k, v in r.files.items() if k != "seg"}) for r in read_manifest(manifest)
    ]
    bare = tmp_path / "bare.csv"
    write_manifest(bare, records)
    without = chosen.model_copy(update={"predict": PredictConfig(prompts="none")})
    found, boxed = tmp_path / "none", tmp_path / "boxes"
    outcome = predict(bare, root, run, found, without, device="cpu")
    assert not outcome.failed and len(outcome.done) == 3
    assert json.loads((found / "record.json").read_text())["prompt_source"] == "none"
    case = records[0].case_id
    volume = np.asanyarray(nib.load(root / records[0].files["t2f"]).dataobj)
    shown = np.flatnonzero((volume != 0).any(axis=(0, 1)))
    with (found / "prompts.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["case_id"] == case]
    assert [int(row["k"]) for row in rows] == shown.tolist()
    assert {(float(row["i1"]), float(row["j1"])) for row in rows} == {tuple(map(float, volume.shape[:2]))}
    predict(manifest, root, run, boxed, chosen, device="cpu")
    whole, some = (np.asanyarray(nib.load(at / f"{case}.nii.gz").dataobj) for at in (found, boxed))
    with (boxed / "prompts.csv").open() as lines:
        ks = {int(row["k"]) for row in csv.DictReader(lines) if row["case_id"] == case}
    assert ks < set(shown.tolist())
    at = sorted(ks)
    assert np.array_equal(whole[..., at], some[..., at]) and some[..., at].any()
    # Another way to predict: nothing is taken for done.
    assert predict(manifest, root, run, boxed, without, device="cpu").done


def test_no_prompt_is_refused_where_a_method_goes_by_them(cohort: tuple[Path, Path, Path], tmp_path: Path) -> None:
    manifest, root, store = cohort
    run = tmp_path / "run"
    train(manifest, store, run, config(name="decoder_only"), device="cpu")
    without = config(name="decoder_only").model_copy(update={"predict": PredictConfig(prompts="none")})
    with pytest.raises(ConfigError, match=r"decoder_only goes by prompts.*prompt_tokens"):
        predict(manifest, root, run, tmp_path / "out", without, device="cpu")
    with pytest.raises(ConfigError, match="--boxes was given beside"):
        predict(manifest, root, run, tmp_path / "out", without, boxes=tmp_path / "b.csv", device="cpu")
    assert not (tmp_path / "out").exists()


def test_stacks_without_neighbours_are_refused(cohort: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Of every second slice none has a neighbour: a stack would hold one slice three times."""
    manifest, root, _ = cohort
    settings = config(name="sd_trans", depth=3, bottleneck=4)
    apart = settings.model_copy(update={"slicing": SlicingConfig(name="every_second")})
    store, _ = prepare(manifest, root, tmp_path / "prepared", apart)
    with pytest.raises(TrainingError, match=r"no slice of the store has one.*slicing\.name=full"):
        train(manifest, store, tmp_path / "run", apart, device="cpu")
    assert not (tmp_path / "run").exists()
    train(manifest, store, tmp_path / "plane", config(name="sd_trans", bottleneck=4), device="cpu")


@pytest.mark.parametrize(
    ("method", "encoder_rate"),
    [
        ({"name": "sam_parser+lora", "rank": 2, "lora_plus": 4.0, "lr_singular": 5e-3}, 1e-3),
        ({"name": "sam_parser", "decoder": "frozen"}, 5e-3),
        ({"name": "prefix", "tokens": 2, "blocks": "global", "decoder": "lora"}, 1e-3),
        ({"name": "prompt_tokens"}, None),
        ({"name": "sd_trans", "depth": 3, "bottleneck": 4}, 1e-3),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_trained_reloaded_and_predicted(
    cohort: tuple[Path, Path, Path], method: dict, encoder_rate: float | None, tmp_path: Path
) -> None:
    manifest, root, store = cohort
    settings = config(**method)
    record = train(manifest, store, tmp_path / "run", settings, device="cpu")
    assert record["method"] == method["name"] and record["reload_check"]["largest_difference"] <= 1e-6
    tensors, metadata = load_adapter(tmp_path / "run" / "adapter.safetensors")
    assert metadata["method_options"]["name"] == method["name"]
    assert sum(t.numel() for t in tensors.values()) == record["trainable_parameters"]
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open(newline="")))
    # The last update of a half cosine stands near its end; only which rate it is of is asked here.
    shown = rows[-1]["lr_encoder"]
    assert (shown == "") is (encoder_rate is None)
    if encoder_rate is not None:
        decay = float(rows[-1]["lr_decoder"]) / 1e-3 if rows[-1]["lr_decoder"] else None
        assert decay is None or float(shown) / encoder_rate == pytest.approx(decay, rel=1e-6)
    outcome = predict(manifest, root, tmp_path / "run", tmp_path / "out", settings, split="val", device="cpu")
    assert outcome.done and len(outcome.done) == record["n_val_cases"] and not outcome.failed
