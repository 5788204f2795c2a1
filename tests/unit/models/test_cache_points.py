"""The encoder cut in two at every point is the encoder, and training from a cache is training without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.labels import MODALITIES
from medsam_lora.models import cache_points
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.sam import SamModel, build
from medsam_lora.models.segmenter import Segmenter

ROOM = 2**28
BOXES = [np.array([[4.0, 6, 30, 40]], np.float32), np.array([[8.0, 8, 20, 30], [20, 10, 36, 44]], np.float32)]
POINTS = {
    "vit_nano": ["block 0", "block 1", "block 3", "trunk", "embedding"],
    "vit_t": ["block 0", "block 1", "block 2", "block 5", "block 8", "block 9", "trunk", "embedding"],
}


@pytest.fixture(scope="module", params=list(POINTS))
def sam(request: pytest.FixtureRequest) -> SamModel:
    return build(request.param, "random", 64)


def slices(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 4, 40, 48, generator=torch.Generator().manual_seed(seed))


def segmenter(model: str, point: str | None = None, **method: Any) -> Segmenter:
    config = MethodConfig(**{"name": "lora", "rank": 2, "blocks": [-1], **method})
    built = build_segmenter(
        ModelConfig(name=model, weights="random", image_size=64),
        config,
        FusionConfig(),
        MODALITIES,
        ["WT"],
        0,
        torch.device("cpu"),
    )
    if point is not None:
        assert built.adaptation.report.cache_point == point
    return built.eval()


def test_both_halves_are_the_whole_at_every_point(sam: SamModel) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = sam.image_encoder(pixels)
        for point in POINTS[sam.name]:
            activation = cache_points.until(sam.image_encoder, pixels, point)
            torch.testing.assert_close(cache_points.onward(sam.image_encoder, activation, point), whole)


def test_only_what_is_behind_the_point_has_a_gradient(sam: SamModel) -> None:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    activation = cache_points.until(sam.image_encoder, pixels, "trunk")
    assert not activation.requires_grad
    sam.zero_grad()
    cache_points.onward(sam.image_encoder, activation, "trunk").square().sum().backward()
    touched = {name for name, p in sam.image_encoder.named_parameters() if p.grad is not None}
    assert touched and all(name.startswith("neck.") for name in touched)


@pytest.mark.parametrize("point", ["block 99", "block", "block -1", "neck", ""])
def test_a_point_that_is_not_there_is_refused(sam: SamModel, point: str) -> None:
    with pytest.raises(ValueError, match="cache point"):
        cache_points.until(sam.image_encoder, torch.zeros(1, 3, 64, 64), point)


@pytest.mark.parametrize(("model", "point"), [("vit_nano", "block 5"), ("vit_t", "block 9")])
def test_training_from_activations_is_training_without(tmp_path: Path, model: str, point: str) -> None:
    """Gradients without a cache, writing it and reading it, and three steps of an optimiser on either."""
    trained = []
    for room in (0, ROOM, ROOM):
        own = segmenter(model, point)
        assert own.use_cache(tmp_path, room, "none") == (room > 0)
        parameters = [p for group in own.trainable_groups().values() for p in group]
        optimiser = torch.optim.SGD(parameters, 0.1)
        for step in range(3):
            optimiser.zero_grad()
            output = own(slices(step), BOXES, tokens=range(4))
            (output.logits.square().mean() + output.iou.square().mean()).backward()
            assert all(p.grad is not None for p in parameters)
            optimiser.step()
        trained.append([p.detach().clone() for p in parameters])
        if own.cache is not None:
            assert (own.cache.hits, own.cache.misses) == ((0, 6) if len(trained) == 2 else (6, 0))
    for plain, writing, reading in zip(*trained, strict=True):
        assert torch.equal(plain, writing) and torch.equal(plain, reading)


def test_the_encoder_before_the_point_does_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = segmenter("vit_nano", "block 5")
    own.use_cache(tmp_path, ROOM, "none")
    seen: list[int] = []
    for number, block in enumerate(own.sam.image_encoder.blocks):
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
    own(slices(), BOXES)
    assert seen == [0, 1, 2, 3, 4, 5]
    own(slices(), BOXES)
    assert seen == [0, 1, 2, 3, 4, 5, 5]


def test_points_do_not_share_entries_and_a_fixed_adapter_keeps_its_embeddings(tmp_path: Path) -> None:
    early, late = segmenter("vit_nano", blocks=[1]), segmenter("vit_nano", blocks=[3])
    for own in (early, late):
        own.use_cache(tmp_path, ROOM, "none")
        plain = segmenter("vit_nano", blocks=own.adaptation.config.blocks)(slices(), BOXES)
        assert torch.equal(own(slices(), BOXES).logits, plain.logits)
        assert own.cache is not None and own.cache.hits == 0
    everywhere = segmenter("vit_nano", blocks=None)
    assert not everywhere.use_cache(tmp_path, ROOM, "none")
    assert everywhere.use_cache(tmp_path, ROOM, "none", fixed="one") and everywhere.cache is not None
    with torch.no_grad():
        first, second = everywhere(slices(), BOXES), everywhere(slices(), BOXES[::-1])
        assert (everywhere.cache.hits, everywhere.cache.misses) == (2, 2)
        everywhere.cache = None
        assert torch.equal(first.logits, everywhere(slices(), BOXES).logits)
        assert torch.equal(second.logits, everywhere(slices(), BOXES[::-1]).logits)
    other = segmenter("vit_nano", blocks=None)
    other.use_cache(tmp_path, ROOM, "none", fixed="another")
    other(slices(), BOXES)
    assert other.cache is not None and other.cache.hits == 0
