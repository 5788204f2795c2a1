"""`SamModel` against segment_anything's own `Sam.forward`, image by image, in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_sam import ENCODERS, toy_sam

from medsam_lora.models import MODELS
from medsam_lora.models.sam import ARCHITECTURES, SamModel, build, fit_positions
from medsam_lora.sam_modules import Sam

TOLERANCE = 1e-4  # of the official output's largest magnitude
COUNTS = [2, 1, 3]


def official(model: SamModel) -> Sam:
    """Upstream's class, and upstream's own modules with the model's tensors."""
    if model.name != "toy":
        stock = SamModel(model.name, *ARCHITECTURES[model.name](), MODELS[model.name].image_size)
        fit_positions(stock, model.image_size)
        stock.load_state_dict(model.state_dict())
        model = stock.eval()
    return Sam(model.image_encoder, model.prompt_encoder, model.mask_decoder)


def raw_images(size: int, short: int, n: int) -> list[Tensor]:
    """RGB images of 0..255 whose long side fills the model frame."""
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(3, short, size, generator=generator) * 255 for _ in range(n)]


def some_boxes(size: int, n: int) -> Tensor:
    corners = torch.rand(n, 4, generator=torch.Generator().manual_seed(5)) * size * 0.4
    return corners + torch.tensor([0.0, 0.0, 0.5, 0.5]) * size


def official_output(sam: Sam, images: list[Tensor], boxes: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """All four tokens of every prompt, by upstream's forward of both modes."""
    records = []
    for image, own in zip(images, boxes, strict=True):
        record = {"image": image, "original_size": tuple(image.shape[1:])}
        records.append(record if own is None else {**record, "boxes": own})
    single, multi = sam(records, multimask_output=False), sam(records, multimask_output=True)
    both = list(zip(single, multi, strict=True))
    logits = [torch.cat([one["low_res_logits"], more["low_res_logits"]], dim=1) for one, more in both]
    iou = [torch.cat([one["iou_predictions"], more["iou_predictions"]], dim=1) for one, more in both]
    return torch.cat(logits), torch.cat(iou)


def normalised(model: SamModel, images: list[Tensor]) -> Tensor:
    """SAM's normalisation, then zeros at the bottom and right, written out."""
    frame = torch.zeros(len(images), 3, model.image_size, model.image_size)
    for slot, image in zip(frame, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = (image - model.pixel_mean) / model.pixel_std
    return frame


def assert_equal_to_official(model: SamModel, counts: list[int] | None) -> None:
    n_images = 2 if counts is None else len(counts)
    images = raw_images(model.image_size, model.image_size * 3 // 4, n_images)
    boxes = None if counts is None else some_boxes(model.image_size, sum(counts))
    with torch.no_grad():
        logits, iou = model(normalised(model, images), boxes, counts)
    own: list[Tensor | None] = [None] * n_images if boxes is None else list(torch.split(boxes, counts))
    expected_logits, expected_iou = official_output(official(model), images, own)
    assert logits.shape == expected_logits.shape
    assert expected_logits.std() > 0
    for ours, theirs in ((logits, expected_logits), (iou, expected_iou)):
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def toy(encoder: str) -> SamModel:
    parts = toy_sam(encoder)
    return SamModel("toy", parts.image_encoder, parts.prompt_encoder, parts.mask_decoder, 64).eval()


@pytest.mark.parametrize("counts", [COUNTS, [1, 1], None], ids=["many", "one", "none"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_toy(encoder: str, counts: list[int] | None) -> None:
    assert_equal_to_official(toy(encoder), counts)


@pytest.mark.parametrize("counts", [COUNTS, None], ids=["many", "none"])
def test_vit_nano(counts: list[int] | None) -> None:
    assert_equal_to_official(build("vit_nano"), counts)


@pytest.mark.parametrize("with_boxes", [False, True], ids=["points", "points and boxes"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_points(encoder: str, with_boxes: bool) -> None:
    model = toy(encoder)
    images = raw_images(model.image_size, model.image_size * 3 // 4, len(COUNTS))
    generator = torch.Generator().manual_seed(6)
    points = torch.rand(sum(COUNTS), 2, 2, generator=generator) * model.image_size * 0.7
    labels = torch.randint(0, 2, (sum(COUNTS), 2), generator=generator)
    boxes = some_boxes(model.image_size, sum(COUNTS)) if with_boxes else None
    with torch.no_grad():
        logits, iou = model.decode(model.encode(normalised(model, images)), boxes, COUNTS, (points, labels))
        records = []
        parts = zip(torch.split(points, COUNTS), torch.split(labels, COUNTS), strict=True)
        for number, (image, (places, kinds)) in enumerate(zip(images, parts, strict=True)):
            record = {"image": image, "original_size": tuple(image.shape[1:])}
            record |= {"point_coords": places, "point_labels": kinds}
            if boxes is not None:
                record["boxes"] = torch.split(boxes, COUNTS)[number]
            records.append(record)
        single, multi = (official(model)(records, multimask_output=several) for several in (False, True))
    both = list(zip(single, multi, strict=True))
    expected = [torch.cat([a["low_res_logits"], b["low_res_logits"]], dim=1) for a, b in both]
    trust = [torch.cat([a["iou_predictions"], b["iou_predictions"]], dim=1) for a, b in both]
    for ours, theirs in ((logits, torch.cat(expected)), (iou, torch.cat(trust))):
        assert ours.shape == theirs.shape
        assert theirs.std() > 0
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_vit_b_at_a_smaller_size() -> None:
    assert_equal_to_official(build("vit_b", "random", 128), [1, 2])


@pytest.mark.real_weights
def test_vit_t_with_official_weights(weights_dir: object) -> None:
    assert_equal_to_official(build("vit_t", "official", 256), COUNTS)


def test_positions_are_those_upstream_interpolates_at_run_time() -> None:
    # Upstream's blocks interpolate a stored table of another length at every forward; ours is stored interpolated.
    native = build("vit_nano", "random", seed=3, attention="reference")
    smaller = build("vit_nano", "random", 160, seed=3, attention="reference")
    assert smaller.image_encoder.blocks[2].attn.rel_pos_h.shape == (19, 32)
    native.image_encoder.pos_embed = smaller.image_encoder.pos_embed
    pixels = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = native.image_encoder(pixels)
        assert torch.equal(smaller.encode(pixels), expected)
        ours = build("vit_nano", "random", 160, seed=3).encode(pixels)
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()
