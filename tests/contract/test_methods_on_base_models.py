"""The methods on the project's own models, through their own forward with several boxes per image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_sam import toy_batch

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError
from medsam_lora.models.sam import SamModel, build
from medsam_lora.peft import METHODS, attach

SIZE = 64


def fresh(name: str) -> SamModel:
    return build(name, weights="random", image_size=SIZE)


@torch.no_grad()
def outputs(model: SamModel) -> Tensor:
    pixels, boxes, _ = toy_batch(3)
    logits, iou = model(pixels[:2], boxes, [2, 1])
    return torch.cat([logits.flatten(), iou.flatten()])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model_name", ["vit_nano", "vit_t"])
def test_start_disable_merge_and_detach(model_name: str, name: str) -> None:
    model = fresh(model_name)
    base = outputs(model)
    keys = list(model.state_dict())
    adaptation = attach(model, MethodConfig(name=name), 0)
    # Bit for bit with upstream's encoder (test_methods.py); the project's own may add up in another order.
    start = torch.allclose(outputs(model), base, rtol=0, atol=1e-5 * base.abs().max().item())
    assert start is METHODS[name].identity
    generator = torch.Generator().manual_seed(0)
    moved = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in adaptation.state().items()}
    adaptation.load(moved)
    adapted = outputs(model)
    assert torch.equal(adapted, base) is (name == "zero_shot")
    with adaptation.disable():
        assert torch.equal(outputs(model), base)
    if METHODS[name].mergeable:
        other = fresh(model_name)
        merged = adaptation.merge()
        assert list(merged) == keys
        other.load_state_dict(merged)
        assert torch.allclose(outputs(other), adapted, rtol=0, atol=1e-4 * adapted.abs().max().item())
    else:
        with pytest.raises(AdapterError, match="cannot be merged"):
            adaptation.merge()
    adaptation.detach()
    assert torch.equal(outputs(model), base)


def test_learned_tokens_start_as_a_box_around_the_whole_frame_and_need_none() -> None:
    model = fresh("vit_nano")
    pixels, boxes, _ = toy_batch(2)
    with torch.no_grad():
        whole, _ = model(pixels, torch.tensor([[0.0, 0.0, SIZE, SIZE]] * 2))
        boxed, _ = model(pixels, boxes)
        attach(model, MethodConfig(name="prompt_tokens"), 0)
        none, _ = model(pixels, None)
        ignored, _ = model(pixels, boxes)
    scale = whole.abs().max().item()
    assert torch.allclose(none, whole, rtol=0, atol=1e-5 * scale)
    assert torch.allclose(ignored, none, rtol=0, atol=1e-5 * scale)
    assert (boxed - whole).abs().max() > 1e-2 * scale


def test_lora_leaves_the_neck_and_the_convolutions_of_vit_t_alone() -> None:
    model = fresh("vit_t")
    adaptation = attach(model, MethodConfig(name="lora", rank=4, decoder="frozen"), 0)
    # q and v of two blocks of 128, six of 160 and two of 320 features, A and B of rank 4: 2 * 2 * 4 * 1,856.
    assert adaptation.report.count == 29_696
    parents = {tensor.name.rsplit(".", 2)[0] for tensor in adaptation.report.tensors}
    assert parents == {f"image_encoder.{site.qkv}" for site in model.image_encoder.attention_sites()}


# TinyViT has attention in two blocks of 128 features, six of 160 and two of 320 (heads of 32).
BLOCKS, FEATURES, HEADS = 10, 2 * 128 + 6 * 160 + 2 * 320, 2 * 4 + 6 * 5 + 2 * 10
BOTTLENECK = 2 * 8 * FEATURES + FEATURES + 8 * BLOCKS
VIT_T_COUNTS = {
    "adapter": 2 * BOTTLENECK,
    "adaptformer": BOTTLENECK,
    "sd_trans": 2 * BOTTLENECK,
    # Beside the two products: LayerNorm of the features, two of the bottleneck, nine weights for each of its channels.
    "prompt_generator": BOTTLENECK + 2 * FEATURES + (2 * 16 + 72) * BLOCKS,
    "prefix": 2 * 4 * FEATURES + HEADS,
    "vpt_deep": 4 * FEATURES,
    "prompt_tokens": 4 * 256,
    "sam_parser": 512,
    # Attention and perceptron of every block, and the neck's two.
    "layernorm": 2 * 2 * FEATURES + 2 * 2 * 256,
}


@pytest.mark.parametrize("name", VIT_T_COUNTS)
def test_the_counts_on_vit_t_are_those_of_the_closed_form(name: str) -> None:
    config = MethodConfig(name=name, rank=4, bottleneck=8, tokens=4, decoder="frozen")
    assert attach(fresh("vit_t"), config, 0).report.count == VIT_T_COUNTS[name]


@pytest.mark.parametrize("model_name", ["vit_nano", "vit_t"])
def test_bitfit_counts_every_bias_of_the_encoder(model_name: str) -> None:
    model = fresh(model_name)
    biases = sum(p.numel() for name, p in model.image_encoder.named_parameters() if name.endswith(".bias"))
    assert attach(model, MethodConfig(name="bitfit", decoder="frozen"), 0).report.count == biases
