"""``export --format onnx``: the graphs in onnxruntime against the run's own model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from export_runs import BASE, SIZE, run_folder, snippet

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.models.assemble import load_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import METHODS
from medsam_lora.stages import export_onnx
from medsam_lora.stages.export import export

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export_onnx.NEEDED),
    reason="needs the extra 'onnx' (onnx, onnxscript, onnxruntime)",
)


class Run:
    """A run, its own model, and the folder with its graphs."""

    def __init__(self, folder: Path, method: MethodConfig, grid: str) -> None:
        self.folder = run_folder(folder / "run", method, BASE.model_copy(update={"grid": grid}))
        self.out = folder / "onnx"
        self.done = export(self.folder, "onnx", self.out)
        self.about = json.loads((self.out / "export.json").read_text())
        self.segmenter: Segmenter = load_segmenter(self.folder / "adapter.safetensors")[0]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("lora"), MethodConfig(name="lora", rank=2), "padded")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A method that cannot be merged, on the grid whose frame is a part of the model's."""
    return Run(tmp_path_factory.mktemp("prefix"), MethodConfig(name="prefix", tokens=3), "unpadded")


@needs_onnx
@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_one_file_takes_any_number_of_boxes(name: str, request: pytest.FixtureRequest) -> None:
    import onnxruntime

    run: Run = request.getfixturevalue(name)
    h, w = run.about["input"]["frame"]
    # The crop of 48 x 30 voxels is 64 x 40 model pixels: three patches wide where nothing is padded beyond them.
    assert (h, w) == ((SIZE, SIZE) if name == "lora" else (SIZE, 48))
    assert sorted(path.name for path in run.out.iterdir()) == ["decoder.onnx", "encoder.onnx", "export.json"]
    encoder, decoder = (onnxruntime.InferenceSession(str(run.out / f"{half}.onnx")) for half in ("encoder", "decoder"))
    pixels = torch.randn(1, 3, h, w, generator=torch.Generator().manual_seed(8))
    sam = run.segmenter.sam
    with torch.no_grad():
        expected = sam.encode(pixels)
        (embedding,) = encoder.run(None, {"pixels": pixels.numpy()})
        assert_close(embedding, expected)
        for n in (1, 5):
            corners = torch.rand(n, 2, generator=torch.Generator().manual_seed(n)) * 20
            boxes = torch.cat([corners, corners + 20], dim=1)
            logits, iou = decoder.run(None, {"embedding": embedding, "boxes": boxes.numpy()})
            expected_logits, expected_iou = sam.decode(expected, boxes, [n])
            stated = run.about["decoder"]["outputs"]["logits"]["shape"]
            assert logits.shape == (n, *stated[1:]) == (n, 4, h // 2, w // 2)
            assert_close(logits, expected_logits)
            assert_close(iou, expected_iou)
    assert run.about["checked"]["largest_difference"] == run.done["largest_difference"] <= 1e-4


def assert_close(found: np.ndarray, expected: torch.Tensor) -> None:
    assert expected.std() > 0
    assert np.abs(found - expected.numpy()).max() <= 1e-4 * float(expected.abs().max())


@needs_onnx
def test_the_graphs_hold_the_adaptation(prefix: Run) -> None:
    import onnxruntime

    pixels = torch.randn(1, 3, *prefix.about["input"]["frame"], generator=torch.Generator().manual_seed(8))
    (found,) = onnxruntime.InferenceSession(str(prefix.out / "encoder.onnx")).run(None, {"pixels": pixels.numpy()})
    with torch.no_grad(), prefix.segmenter.adaptation.disable():
        base = prefix.segmenter.sam.encode(pixels)
    assert np.abs(found - base.numpy()).max() > 1e-2 * float(base.abs().max())


@needs_onnx
@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_the_page_s_snippet_gives_our_mask(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 48, 30, generator=generator).masked_fill(torch.rand(2, 48, 30, generator=generator) < 0.2, 0)
    boxes = np.array([[5, 4, 30, 22], [20, 10, 44, 27]], np.float32)
    monkeypatch.chdir(run.out.parent)
    found = snippet("## ONNX", {"z": z.numpy(), "boxes": boxes})
    with torch.no_grad():
        logits = run.segmenter(z[None], [boxes]).logits[0, 0]
    sure = (logits.abs() > 1e-4 * logits.abs().max()).numpy()
    assert sure.mean() > 0.99 and 0 < found["mask"].mean() < 1
    assert np.array_equal(found["mask"][sure], (logits > 0).numpy()[sure])


@needs_onnx
def test_graphs_of_something_else_are_refused_and_not_left(
    lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run_folder(tmp_path / "other", MethodConfig(name="decoder_only"))
    monkeypatch.setattr(export_onnx, "write_graph", lambda m, x, path, *names: shutil.copy(lora.out / path.name, path))
    with pytest.raises(AdapterError, match="of the largest value, more than"):
        export(other, "onnx")
    assert [path.name for path in (tmp_path / "other" / "export").iterdir()] == []


@needs_onnx
def test_stacks_of_slices_are_graphs_too(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", MethodConfig(name="sd_trans", depth=3, bottleneck=2))
    done = export(run, "onnx")
    assert 0 < done["largest_difference"] <= export_onnx.TOLERANCE
    about = json.loads((Path(done["out"]) / "export.json").read_text())
    assert "3 neighbouring slices" in about["input"]["one_image"]


TESTED_ABOVE = ("lora", "prefix", "sd_trans")
GRAPHS = [
    *((name, "vit_nano") for name in (*METHODS, "sam_parser+lora") if name not in TESTED_ABOVE),
    *((name, "vit_t") for name in ("lora", "adapter", "sam_parser")),
]


@needs_onnx
@pytest.mark.parametrize(("name", "base"), GRAPHS)
def test_every_method_exports_as_a_graph(name: str, base: str, tmp_path: Path) -> None:
    method = MethodConfig(name=name, rank=2, bottleneck=2, tokens=2)
    run = run_folder(tmp_path / "run", method, BASE.model_copy(update={"name": base}))
    # The export runs both graphs in onnxruntime beside the run's own model, and refuses a difference.
    done = export(run, "onnx")
    assert 0 < done["largest_difference"] <= export_onnx.TOLERANCE
    assert {path.name for path in Path(done["out"]).iterdir()} == {"decoder.onnx", "encoder.onnx", "export.json"}


@needs_onnx
def test_a_graph_needs_one_size(tmp_path: Path) -> None:
    unpadded = BASE.model_copy(update={"grid": "unpadded"})
    run = run_folder(tmp_path / "run", MethodConfig(name="lora", rank=2), unpadded, crop=None)
    with pytest.raises(AdapterError, match=r"unpadded grid of uncropped slices.*monai-bundle"):
        export(run, "onnx")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run", MethodConfig(name="lora", rank=2))
    monkeypatch.setattr(export_onnx, "NEEDED", ("no_such_package",))
    with pytest.raises(ConfigError, match="needs no_such_package") as refused:
        export(folder, "onnx", tmp_path / "out")
    assert "medsam-lora[onnx]" in str(refused.value) and not (tmp_path / "out").exists()
