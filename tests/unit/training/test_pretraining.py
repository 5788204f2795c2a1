"""Pre-training: sizes, prompts and losses of a step, each against what can be written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medsam_lora.models.sam import build
from medsam_lora.training import pretrain as module
from medsam_lora.training.held_out import shape_iou
from medsam_lora.training.pretrain import at_size, encode, new_optimiser, pretrain
from medsam_lora.training.recipe import Course, Recipe
from medsam_lora.training.scene_batch import points_in, scene_batch, shaken_box

RECIPE = Recipe([Course(6, [32, 64], [3, 2])], 1e-3, 0.0, 3)


def test_another_size_is_what_a_model_of_that_size_would_compute() -> None:
    native = build("vit_nano", "random", 64, seed=2)
    smaller = build("vit_nano", "random", 64, seed=2)
    from medsam_lora.models.sam import fit_positions

    fit_positions(smaller, 32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3.0, 4, 20, 25], [8, 8, 30, 16]])
    with torch.no_grad():
        expected, _ = smaller(pixels, boxes)
        with at_size(native, 32):
            found, _ = native.decode(encode(native, pixels), boxes)
        assert torch.allclose(found, expected, atol=1e-5)
    assert native.prompt_encoder.input_image_size == (64, 64)
    assert native.prompt_encoder.image_embedding_size == (8, 8)


def test_every_tensor_learns_from_both_sizes() -> None:
    sam = build("vit_nano", "random", 64, seed=0)
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    pretrain(sam, new_optimiser(sam, RECIPE), RECIPE)
    same = [name for name, tensor in sam.state_dict().items() if torch.equal(tensor, before[name])]
    # The Fourier features are fixed; mask prompts and negative points are not asked for.
    untouched = ("pe_layer", "mask_downscaling", "point_embeddings.0")
    assert all(any(part in name for part in untouched) for name in same), same


def test_two_halves_are_the_whole() -> None:
    def train(stop: int) -> dict[str, torch.Tensor]:
        sam = build("vit_nano", "random", 64, seed=0)
        optimiser = new_optimiser(sam, RECIPE)
        for step in range(1, stop + 1):
            module.train_step(sam.train(), optimiser, RECIPE, step)
        pretrain(sam, optimiser, RECIPE, first=stop + 1)
        return sam.state_dict()

    whole, halves = train(0), train(4)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_rate_rises_then_falls_to_nothing() -> None:
    recipe = Recipe([Course(400, [32], [1])], 2e-3, 0.0, 0)
    rates = [recipe.rate(step) for step in range(1, 401)]
    assert rates[0] == pytest.approx(2e-3 / 50)
    assert rates[199] == pytest.approx(2e-3 * 0.5 * (1 + np.cos(np.pi * 199 / 400)))
    assert 0 < rates[-1] < 1e-6
    with pytest.raises(ValueError, match="behind the last"):
        recipe.pictures(401)


def test_a_batch_is_a_function_of_seed_step_and_number() -> None:
    whole, second = scene_batch(1, 5, range(4), 32), scene_batch(1, 5, [1, 3], 32)
    assert torch.equal(whole.pixels[[1, 3]], second.pixels)
    assert [whole.counts[1], whole.counts[3]] == second.counts
    assert sum(whole.counts) == len(whole.boxes) == len(whole.masks) == len(whole.points[0])
    assert not torch.equal(whole.pixels, scene_batch(1, 6, range(4), 32).pixels)


def test_points_lie_in_the_object_and_boxes_about_it() -> None:
    mask = np.zeros((50, 60), bool)
    mask[10:20, 30:50] = True
    generator = np.random.default_rng(0)
    for x, y in points_in(generator, mask, 40):
        assert mask[int(y), int(x)]
    boxes = np.stack([shaken_box(generator, mask) for _ in range(400)])
    exact = (boxes == [30, 10, 50, 20]).all(axis=1)
    assert 0.4 < exact.mean() < 0.6
    assert (np.abs(boxes - [30, 10, 50, 20]) <= [2, 1, 2, 1]).all()
    assert (np.abs(boxes[~exact] - [30, 10, 50, 20]).max(axis=0) > [1.5, 0.7, 1.5, 0.7]).all()


def test_weights_of_cells_by_hand() -> None:
    target = torch.zeros(1, 1, 8, 8)
    target[0, 0, 2:4, 5] = 1
    # Box rows 2-3, column 5; margin 1 + (extent - 1) // 4 = 1.
    expected = torch.full((8, 8), 0.1)
    expected[1:5, 4:7] = 1.0
    assert torch.allclose(module._near(target)[0, 0], expected)


def test_loss_by_hand() -> None:
    target = torch.zeros(1, 1, 4, 4)
    target[0, 0, 1:3, 1:3] = 1
    good, bad = torch.where(target[0, 0] > 0, 9.0, -9.0), torch.zeros(4, 4)
    logits = torch.stack([bad, good, bad, -good])[None]
    weight = torch.ones(1, 1, 4, 4)

    def term(one: torch.Tensor) -> float:
        p = torch.sigmoid(one)
        overlap, total = float((p * target).sum()), float(p.sum() + target.sum())
        return 1 - (2 * overlap + 1) / (total + 1) + float(F.binary_cross_entropy_with_logits(one, target[0, 0]))

    iou = torch.tensor([[0.0, 0.5, 0.0, 0.0]])
    # Logits of 0 count as background: IoU 0 for `bad`, 1 for `good`, 0 for its opposite.
    error = 0.25 * (0.5**2)
    three = [term(good), term(bad), term(-good)]
    for ambiguous, share in ((False, 0.1), (True, 0.5)):
        expected = term(bad) + share * min(three) + 0.02 * sum(three) / 3 + 0.1 * error
        loss, found = module._loss(logits, iou, target, weight, ambiguous)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        assert found == 0.0


def test_held_out_shapes_score_a_perfect_and_an_empty_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = build("vit_nano", "random", 64)
    from medsam_lora.datasets.shapes import make_sample
    from medsam_lora.training import held_out

    truth = [make_sample(np.random.default_rng([5, i]), 64).mask for i in range(3)]
    masks = torch.from_numpy(np.stack(truth))[:, None]
    answers = torch.where(masks, 5.0, -5.0).repeat(1, 4, 1, 1)
    monkeypatch.setattr(type(sam), "forward", lambda self, pixels, boxes: (answers, None))
    assert held_out.shape_iou(sam, 3, seed=5).tolist() == [1.0, 1.0, 1.0]
    answers = -torch.ones_like(answers)
    assert shape_iou(sam, 3, seed=5).tolist() == [0.0, 0.0, 0.0]
