"""``export --format sam-pth`` and ``safetensors``: merged weights in segment_anything's own classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from export_runs import BASE, SIZE, run_folder, snippet
from torch import Tensor

from medsam_lora.cli import main
from medsam_lora.config import MethodConfig, build_config, dump_config
from medsam_lora.models.assemble import load_segmenter
from medsam_lora.models.tiny_vit import TinyViT
from medsam_lora.sam_modules import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from medsam_lora.stages.export import export

LORA = MethodConfig(name="lora", rank=2, dora=True)


def stock_sam(about: Path, weights: Path) -> Sam:
    """Of a ViT by the Python of docs/export.md; of vit_t from TinyViT and segment_anything's classes."""
    size = json.loads(about.read_text())["image_size"]
    if json.loads(about.read_text())["model"] != "vit_t":
        found: Sam = snippet("## Stock SAM weights", {})["sam"]
        return found
    sam = Sam(
        image_encoder=TinyViT(size, 256),
        prompt_encoder=PromptEncoder(256, (size // 16, size // 16), (size, size), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048),
            iou_head_hidden_dim=256,
        ),
    ).eval()
    sam.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    return sam


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out + captured.err


def stock_masks(sam: Sam, grey: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and masks of a grey picture 0..255 on its own grid, by Sam.forward."""
    record = {"image": grey.expand(3, -1, -1), "original_size": tuple(grey.shape), "boxes": boxes}
    with torch.no_grad():
        (found,) = sam([record], multimask_output=False)
    return found["low_res_logits"], found["masks"]


@pytest.mark.parametrize(("name", "kind"), [("vit_nano", "sam-pth"), ("vit_nano", "safetensors"), ("vit_t", "sam-pth")])
def test_stock_classes_give_our_masks(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path / "lora", LORA, BASE.model_copy(update={"name": name}), modalities=["t1c"])
    code, text = run("export", folder, "--format", kind, capsys=capsys)
    assert code == 0
    out = folder / "export" / f"sam.{'pth' if kind == 'sam-pth' else 'safetensors'}"
    assert str(out) in text and "largest difference" in text
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([out.name, "sam.json"])
    monkeypatch.chdir(out.parent)
    if kind == "safetensors":
        # The same names and tensors in another file.
        torch.save(safetensors.torch.load_file(out), "sam.pth")
    sam = stock_sam(out.with_name("sam.json"), out)
    # One slice: the long side is the model frame, so that only the padding is left to do.
    segmenter, _ = load_segmenter(folder / "adapter.safetensors")
    about = json.loads((out.parent / "sam.json").read_text())
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(SIZE, SIZE * 3 // 4, generator=generator)
    z[:8] = 0
    low, high = (about["input"]["range"][key] for key in ("low", "high"))
    grey = ((z - low) / (high - low)).clamp(0, 1).mul(255).masked_fill(z == 0, 0)
    corners = np.array([[12, 9, 40, 33], [20, 16, 50, 44]], np.float32)
    with torch.no_grad():
        ours = [segmenter(z[None, None], [box[None]]).logits[0, 0] for box in corners]
    boxes = torch.from_numpy(corners[:, [1, 0, 3, 2]])
    logits, masks = stock_masks(sam, grey, boxes)
    assert logits.std() > 0 and masks.any() and not masks.all()
    for one, mask in zip(ours, masks[:, 0], strict=True):
        # A pixel whose logit is zero up to rounding may fall on either side.
        sure = one.abs() > 1e-4 * float(one.abs().max())
        assert torch.equal(mask[sure], one[sure] > 0) and sure.float().mean() > 0.99
    # The adapter is in: the base gives something else.
    with segmenter.adaptation.disable(), torch.no_grad():
        base = segmenter(z[None, None], [corners[:1]]).logits[0, 0]
    assert (base - ours[0]).abs().max() > 1e-2 * ours[0].abs().max()


def test_the_side_car_says_what_the_weights_do_not(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "lora", LORA, fusion="learned")
    done = export(folder, "sam-pth", tmp_path / "there" / "merged.pth")
    assert done["files"] == [str(tmp_path / "there" / name) for name in ("merged.pth", "merged.json")]
    about = json.loads((tmp_path / "there" / "merged.json").read_text())
    weights = about["fusion"]["weights"]
    assert list(weights) == ["t1c", "t2f"] and sum(weights.values()) == pytest.approx(1)
    assert about["masks"]["tokens"] == {"WT": 0} and about["input"]["frame"] == [SIZE, SIZE]
    assert about["checked"]["largest_difference"] == done["largest_difference"] <= 1e-4


def test_the_side_car_has_the_run_s_threshold(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "lora", LORA)
    export(folder, "sam-pth", tmp_path / "plain.pth")
    config = build_config({"predict": {"threshold": 0.8}})
    (folder / "config.yaml").write_text(dump_config(config))
    export(folder, "sam-pth", tmp_path / "own.pth")
    plain, own = (json.loads((tmp_path / f"{name}.json").read_text())["masks"] for name in ("plain", "own"))
    assert (plain["threshold"], plain["logit_above"]) == (0.5, 0)
    assert own["threshold"] == 0.8 and own["logit_above"] == pytest.approx(np.log(4))


@pytest.mark.parametrize("kind", ["sam-pth", "safetensors"])
def test_refusals_name_what_works(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "prefix", MethodConfig(name="prefix", tokens=2))
    code, text = run("export", folder, "--format", kind, capsys=capsys)
    assert code == 2 and "method prefix cannot be merged" in text and "--format onnx, monai-bundle" in text
    unpadded = run_folder(tmp_path / "unpadded", LORA, BASE.model_copy(update={"grid": "unpadded"}))
    code, text = run("export", unpadded, "--format", kind, capsys=capsys)
    assert code == 2 and "unpadded grid" in text and "--format onnx, monai-bundle" in text
    for left in (folder, unpadded):
        assert [path.name for path in left.iterdir()] == ["adapter.safetensors"]


def test_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "lora", LORA)
    code, text = run("export", folder, "--format", "onxx", capsys=capsys)
    assert code == 2 and "did you mean onnx?" in text
    code, text = run("export", tmp_path / "none", "--format", "sam-pth", capsys=capsys)
    assert code == 2 and "no adapter of a finished run" in text
    code, text = run("export", folder, "--format", "sam-pth", "--out", tmp_path / "a.bin", capsys=capsys)
    assert code == 2 and "*.pth" in text
    there = tmp_path / "there.pth"
    there.write_text("mine")
    code, text = run("export", folder, "--format", "sam-pth", "--out", there, capsys=capsys)
    assert code == 2 and "it exists" in text and there.read_text() == "mine"
