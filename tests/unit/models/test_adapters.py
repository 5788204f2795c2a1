"""Several adapters on one base model: each gives what it gave alone, and a wrong one is refused with both hashes."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.errors import AdapterError
from medsam_lora.models.adapters import AdapterBank
from medsam_lora.models.assemble import adapter_metadata, build_segmenter, load_segmenter
from medsam_lora.models.checkpoint import save_adapter
from medsam_lora.models.sam import build
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft.contract import swap
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.stages import PreparePlan

MODALITIES = ["t1n", "t1c"]
METHODS = [
    MethodConfig(name="lora", rank=2),
    MethodConfig(name="lora", rank=4, targets=["q", "k", "v"]),
    MethodConfig(name="sam_parser+lora", rank=2),
    MethodConfig(name="prefix", tokens=3),
]


def model(**changes: object) -> ModelConfig:
    return ModelConfig(name="vit_nano", weights="random", image_size=64).model_copy(update=changes)


def write(path: Path, method: MethodConfig, base: ModelConfig, modalities: list[str] = MODALITIES) -> Path:
    fusion = FusionConfig(name="learned")
    segmenter = build_segmenter(base, method, fusion, modalities, ["WT"], 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(len(method.name))
    moved = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in segmenter.adapter_state().items()}
    plan = PreparePlan(tuple(modalities), crop=CropPlan("none")).to_json()
    save_adapter(path, moved, {**adapter_metadata(segmenter, base, method, fusion, 0), "plan": plan})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write(folder / f"a{i}.safetensors", method, model()) for i, method in enumerate(METHODS)]


@torch.no_grad()
def outputs(segmenter: Segmenter) -> Tensor:
    z = torch.randn(1, 2, 20, 24, generator=torch.Generator().manual_seed(0))
    return segmenter(z, [np.array([[2.0, 3.0, 12.0, 14.0]])]).logits


@torch.no_grad()
def of_base(sam: torch.nn.Module) -> Tensor:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return sam(pixels, torch.tensor([[8.0, 8, 40, 40]]))[0]


def test_each_adapter_gives_on_a_shared_base_what_it_gives_alone(files: list[Path]) -> None:
    alone = [outputs(load_segmenter(path)[0]) for path in files]
    sam = build("vit_nano", "random", 64)
    base = of_base(sam)
    bank = AdapterBank(sam)
    names = [bank.attach(path) for path in files]
    assert names == bank.names == ["a0", "a1", "a2", "a3"] and bank.active is None
    assert torch.equal(of_base(sam), base)
    for i in (0, 1, 2, 3, 1, 0, 3):
        segmenter = bank.swap(names[i])
        assert segmenter is not None and torch.equal(outputs(segmenter), alone[i])
        with bank.disable():
            assert torch.equal(of_base(sam), base)
    assert len({tuple(out.flatten().tolist()) for out in alone}) == len(files)
    assert bank.swap(None) is None
    with bank.disable():
        assert torch.equal(of_base(sam), base)


def test_a_segmenter_whose_adapter_was_swapped_out_refuses(files: list[Path]) -> None:
    """It would give the masks of the other adapter, or of the base, as its own."""
    bank = AdapterBank(build("vit_nano", "random", 64))
    first, second = (bank.swap(bank.attach(path)) for path in files[:2])
    assert first is not None and second is not None
    with bank.disable():
        outputs(second)
    with pytest.raises(AdapterError, match="not in use: another one was swapped in"):
        outputs(first)
    bank.swap(None)
    with pytest.raises(AdapterError, match="not in use"):
        outputs(second)
    assert bank.swap("a0") is first
    outputs(first)


def test_attaching_leaves_the_adapter_in_use_alone(files: list[Path]) -> None:
    bank = AdapterBank(build("vit_nano", "random", 64))
    segmenter = bank.swap(bank.attach(files[0], "first"))
    assert segmenter is not None
    before = outputs(segmenter)
    bank.attach(files[1])
    with pytest.raises(AdapterError):
        bank.attach(files[0], "first")
    assert bank.active == "first" and torch.equal(outputs(segmenter), before)
    with pytest.raises(AdapterError, match=r"no adapter is called 'frist'; did you mean first\?"):
        bank.swap("frist")


def test_swapping_takes_less_than_building_the_base(files: list[Path]) -> None:
    started = time.process_time()
    bank = AdapterBank(build("vit_nano", "random", 64))
    built = time.process_time() - started
    names = [bank.attach(path) for path in files[:2]]
    started = time.process_time()
    for i in range(20):
        bank.swap(names[i % 2])
    assert (time.process_time() - started) / 20 < built


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "base weights"),
        ({"image_size": 96}, "trained at 96 px"),
    ],
)
def test_another_base_is_refused_with_both_hashes(change: dict, words: str, tmp_path: Path) -> None:
    bank = AdapterBank(build("vit_nano", "random", 64))
    path = write(tmp_path / "a.safetensors", METHODS[0], model(**change))
    with pytest.raises(AdapterError, match=words) as error:
        bank.attach(path)
    theirs = build("vit_nano", "random", 64, change.get("seed", 0)).base_sha256
    assert len(set(re.findall(r"[0-9a-f]{64}", str(error.value)))) == len({theirs, bank.sam.base_sha256})
    assert {theirs, bank.sam.base_sha256} == set(re.findall(r"[0-9a-f]{64}", str(error.value)))
    assert bank.names == []


def test_another_model_modalities_and_rank_are_refused_with_both_hashes(files: list[Path], tmp_path: Path) -> None:
    sam = build("vit_nano", "random", 64)
    bank = AdapterBank(sam, MODALITIES[::-1])
    with pytest.raises(AdapterError, match=f"trained on t1n, t1c, the images are t1c, t1n .*{sam.base_sha256}"):
        bank.attach(files[0])
    bank = AdapterBank(build("vit_t", "random", 64))
    with pytest.raises(AdapterError, match=f"not on vit_t .*{sam.base_sha256}, this one {bank.sam.base_sha256}"):
        bank.attach(files[0])
    # A file whose tensors have another rank than its options say.
    segmenter, metadata = load_segmenter(files[0])
    options = {**metadata["method_options"], "rank": 3}
    wrong = tmp_path / "wrong.safetensors"
    save_adapter(wrong, segmenter.adapter_state(), {**metadata, "method_options": options})
    bank = AdapterBank(sam)
    base = of_base(sam)
    with pytest.raises(AdapterError, match=rf"lora_q.A is \(2, 192\).*not \(3, 192\).*{sam.base_sha256}"):
        bank.attach(wrong)
    with pytest.raises(AdapterError, match=rf"wrong.safetensors: .*lora_q.A is \(2, 192\).*{sam.base_sha256}"):
        load_segmenter(wrong)
    assert torch.equal(of_base(sam), base) and bank.names == []


def test_an_adapter_of_the_other_grid_is_refused(tmp_path: Path) -> None:
    bank = AdapterBank(build("vit_nano", "random", 64))
    path = write(tmp_path / "a.safetensors", METHODS[0], model(grid="unpadded"))
    with pytest.raises(AdapterError, match="unpadded"):
        bank.attach(path)
    assert bank.names == []


def test_an_adaptation_of_another_model_cannot_be_swapped_in(files: list[Path]) -> None:
    one, other = load_segmenter(files[0])[0], load_segmenter(files[1])[0]
    with pytest.raises(AdapterError, match="made for another model"):
        swap(one.sam, other.adaptation)
    assert one.adaptation.enabled
    with pytest.raises(AdapterError, match="is attached to this model"):
        AdapterBank(one.sam)
