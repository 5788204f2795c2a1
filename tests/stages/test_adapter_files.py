"""``adapter info``, ``merge`` and ``diff`` on files of a small real model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import run_folder

from medsam_lora.cli import main
from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.errors import AdapterError
from medsam_lora.io.files import sha256_of
from medsam_lora.models.adapters import AdapterBank
from medsam_lora.models.assemble import adapter_metadata, build_segmenter
from medsam_lora.models.checkpoint import load_adapter, save_adapter
from medsam_lora.models.sam import build
from medsam_lora.stages.adapters import diff, info, merge
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.stages import PreparePlan

BASE = ModelConfig(name="vit_nano", weights="random", image_size=64)


def write(path: Path, method: MethodConfig, step: float = 0.05) -> Path:
    fusion = FusionConfig()
    segmenter = build_segmenter(BASE, method, fusion, ["t1c", "t2f"], ["WT"], 0, torch.device("cpu"))
    moved = {name: tensor + step for name, tensor in segmenter.adapter_state().items()}
    plan = PreparePlan(("t1c", "t2f"), crop=CropPlan("none")).to_json()
    save_adapter(path, moved, {**adapter_metadata(segmenter, BASE, method, fusion, 0), "plan": plan})
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = MethodConfig(name="lora", rank=2, blocks=[1], decoder="frozen", dora=True)
    return write(tmp_path_factory.mktemp("lora") / "adapter.safetensors", method)


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out + captured.err


def test_info_says_what_is_in_the_file(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = info(lora)
    # q and v of one block of 192 features: two pairs of rank 2, two magnitudes.
    assert found["parameters"] == 2 * (2 * 2 * 192 + 192)
    assert found["parameters_by_part"] == {"image_encoder": found["parameters"]}
    assert found["options"]["rank"] == 2 and found["options"]["dora"] is True and "tokens" not in found["options"]
    assert found["base_sha256"] == build("vit_nano", "random", 64).base_sha256
    assert (found["modalities"], found["mergeable"]) == (["t1c", "t2f"], True)
    code, text = run("adapter", "info", lora, "--json", capsys=capsys)
    assert code == 0 and json.loads(text) == found
    code, text = run("adapter", "info", lora, capsys=capsys)
    assert code == 0 and "blocks=1" in text and found["content_sha256"] in text
    code, text = run("adapter", "info", lora.with_name("none"), capsys=capsys)
    assert code == 2 and "no such adapter file" in text


@pytest.mark.parametrize("name", ["merged.pth", "merged.safetensors"])
def test_the_merged_file_is_a_stock_checkpoint(
    lora: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    code, text = run("adapter", "merge", lora, "--out", out, capsys=capsys)
    assert code == 0 and str(out) in text
    assert [path.name for path in tmp_path.iterdir()] == [name]
    base, merged = build("vit_nano", "random", 64), build("vit_nano", str(out), 64)
    changed = [k for k, v in merged.state_dict().items() if not torch.equal(v, base.state_dict()[k])]
    assert changed == ["image_encoder.blocks.1.attn.qkv.weight"]
    before = sha256_of(out)
    code, text = run("adapter", "merge", lora, "--out", out, capsys=capsys)
    assert code == 2 and "the file exists" in text and sha256_of(out) == before


def test_what_cannot_be_merged_is_refused(tmp_path: Path, lora: Path) -> None:
    path = write(tmp_path / "adapter.safetensors", MethodConfig(name="adaptformer", bottleneck=2))
    with pytest.raises(AdapterError, match="adaptformer cannot be merged"):
        merge(path, tmp_path / "out.pth")
    with pytest.raises(AdapterError, match="names no kind of checkpoint"):
        merge(lora, tmp_path / "out.bin")
    # Its weights would load, and compute something else on every picture that is not square.
    unpadded = BASE.model_copy(update={"grid": "unpadded"})
    folder = run_folder(tmp_path / "unpadded", MethodConfig(name="lora", rank=2), unpadded)
    with pytest.raises(AdapterError, match=r"unpadded grid.*model\.grid=padded"):
        merge(folder / "adapter.safetensors", tmp_path / "out.pth")
    assert info(folder / "adapter.safetensors")["grid"] == "unpadded" and info(lora)["grid"] == "padded"
    shutil.rmtree(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_diff_against_the_base(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diff(lora)
    (row,) = found["tensors"]
    assert row["name"] == "image_encoder.blocks.1.attn.qkv.weight" and row["shape"] == [576, 192]
    merge(lora, tmp_path / "m.pth")
    after, before = (build("vit_nano", w, 64).state_dict()[row["name"]] for w in (str(tmp_path / "m.pth"), "random"))
    assert row["change"] == pytest.approx(float((after - before).norm()), rel=1e-4)
    assert row["relative"] == pytest.approx(row["change"] / float(before.norm()), rel=1e-4)
    code, text = run("adapter", "diff", lora, capsys=capsys)
    assert code == 0 and "1 tensors differ" in text
    # What has no place in the base is named.
    tokens = write(tmp_path / "t.safetensors", MethodConfig(name="prompt_tokens", decoder="frozen"))
    assert diff(tokens)["only_here"] == ["prompt_encoder.learned_tokens"] and diff(tokens)["tensors"] == []


def test_diff_of_two_files(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = MethodConfig(name="lora", rank=2, blocks=[1], decoder="frozen")
    plain = write(tmp_path / "plain.safetensors", method, 0.15)
    found = diff(lora, plain)
    assert list(found["metadata"]) == ["method_options"]
    assert len(found["only_here"]) == 2 and all(name.endswith("magnitude") for name in found["only_here"])
    # B starts at 0: 0.05 against 0.15 in each of 192 x 2 places.
    b = next(row for row in found["tensors"] if row["name"].endswith("lora_q.B"))
    assert b["change"] == pytest.approx(0.1 * (192 * 2) ** 0.5, rel=1e-5)
    assert b["relative"] == pytest.approx(2.0, rel=1e-5)
    other = write(tmp_path / "r3.safetensors", method.model_copy(update={"rank": 3}))
    shapes = next(r for r in diff(plain, other)["tensors"] if r["name"].endswith("lora_q.A"))["shape"]
    assert shapes == [[2, 192], [3, 192]]
    code, text = run("adapter", "diff", plain, other, capsys=capsys)
    assert code == 0 and "another shape" in text


def changed(path: Path, out: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: Any) -> Path:
    """The file again, with more tensors or other metadata."""
    own, said = load_adapter(path)
    save_adapter(out, {**own, **(tensors or {})}, {**said, **metadata})
    return out


def test_merge_writes_beside_the_file_by_default(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(lora, tmp_path / "a.safetensors"))
    code, text = run("adapter", "merge", path, capsys=capsys)
    assert code == 0 and str(tmp_path / "merged.pth") in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "merged.pth"]
    before = sha256_of(tmp_path / "merged.pth")
    code, text = run("adapter", "merge", path, capsys=capsys)
    assert code == 2 and "merged.pth: the file exists" in text and sha256_of(tmp_path / "merged.pth") == before


def test_tensors_of_another_rank_are_refused_with_file_and_hashes(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**load_adapter(lora)[1]["method_options"], "rank": 3}
    wrong = changed(lora, tmp_path / "a.safetensors", method_options=options)
    digest = build("vit_nano", "random", 64).base_sha256
    for words in (("adapter", "merge"), ("adapter", "diff"), ("export", "--format", "onnx")):
        code, text = run(*words, wrong, capsys=capsys)
        text = " ".join(text.split())
        assert code == 2 and f"{wrong}: the tensors do not fit method lora" in text
        assert f"(the adapter's base is {digest}, this one {digest})" in text and "Remedy: " in text


def test_tensors_that_the_fusion_does_not_have_are_refused(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = changed(lora, tmp_path / "a.safetensors", {"fusion.modality_weights": torch.zeros(2)})
    code, text = run("adapter", "merge", wrong, capsys=capsys)
    assert code == 2 and str(wrong) in text and "modality_weights" in text and "the adapter's base is" in text


def test_weights_of_another_architecture_are_refused_with_both_hashes(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "vit_t.pth"
    torch.save(build("vit_t", "random", 64).state_dict(), other)
    code, text = run("adapter", "merge", lora, "--weights", other, capsys=capsys)
    assert code == 2 and str(lora) in text and str(other) in text and "missing" in text
    assert build("vit_nano", "random", 64).base_sha256 in text and sha256_of(other) in text
    code, text = run("adapter", "merge", lora, "--weights", tmp_path / "none.pth", capsys=capsys)
    assert code == 2 and "none.pth: no such file" in text


@pytest.mark.parametrize("words", [("adapter", "info"), ("adapter", "merge"), ("export", "--format", "monai-bundle")])
def test_a_file_of_an_unknown_method_is_named(
    words: tuple[str, ...], lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**load_adapter(lora)[1]["method_options"], "name": "newmethod"}
    path = changed(lora, tmp_path / "a.safetensors", method="newmethod", method_options=options)
    code, text = run(*words, path, capsys=capsys)
    assert code == 2 and f"{path}: " in text and "'newmethod'" in text
    assert "newer version" in text and "another program" in text and "method.name" not in text


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"plan": {"x": 1}}, "plan: 'crop' is missing"),
        ({"plan": {}}, "plan: 'crop' is missing"),
        ({"plan": 3}, "plan: "),
        ({"plan": PreparePlan().to_json()}, "plan: the crop is not fitted"),
        ({"modalities": ["t1c", "zzz"]}, "modalities: zzz is none of t1n, t1c, t2f, t2w"),
        ({"modalities": ["t1c", "t1c"]}, "modalities: t1c is named twice"),
        ({"modalities": []}, "modalities: none is named"),
        ({"regions": ["XX"]}, "regions: XX is none of WT, TC, ET"),
        ({"regions": "WT"}, "regions: a list of names"),
        ({"input_spec": {"name": "window"}}, "input_spec: an input spec needs name, low and high: low, high missing"),
        ({"input_spec": None}, "input_spec: "),
        ({"model": {"name": "vit_x"}}, "model: "),
        ({"fusion": "sum"}, "fusion: "),
        ({"seed": "x"}, "seed: "),
        ({"method": "bitfit"}, "method: bitfit, but the options are those of lora"),
    ],
    ids=str,
)
def test_metadata_that_mean_nothing_are_one_clear_error(
    metadata: dict[str, Any], named: str, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(lora, tmp_path / "a.safetensors", **metadata)
    code, text = run("export", path, "--format", "sam-pth", capsys=capsys)
    assert code == 2 and f"{path}: its metadata cannot be read: {named}" in text, text
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and len(text.splitlines()) == 1
    with pytest.raises(AdapterError, match="its metadata cannot be read"):
        AdapterBank(build("vit_nano", "random", 64)).attach(path)
