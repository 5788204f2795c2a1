"""What happens when memory runs out, and a second prompt of a case whose embeddings are there."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.inference.batches import BatchLimit, in_batches
from medsam_lora.inference.predictor import PredictOptions, embed_case, predict_slices
from medsam_lora.labels import MODALITIES
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.records import PreparedSlices

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def case() -> PreparedSlices:
    generator = np.random.default_rng(0)
    image = generator.integers(1, 900, (7, 4, 40, 48)).astype(np.int16)
    grid = Geometry((40, 48, 7), np.eye(4))
    moments = np.full((7, 4), 450.0), np.full((7, 4), 250.0)
    return PreparedSlices(
        "a", "a", "test", MODALITIES, image, None, tuple(range(7)), *moments, "nonzero", grid, grid, {}
    )


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return build_segmenter(
        ModelConfig(name="vit_nano", weights="random", image_size=64),
        MethodConfig(name="lora", rank=2),
        FusionConfig(),
        MODALITIES,
        ["WT"],
        0,
        torch.device("cpu"),
    )


BOXES = {k: np.array([[5.0 + k, 6, 30, 40]]) for k in range(7)}


def room_for(segmenter: Segmenter, n_images: int, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Let the encoder run out of memory with more images than these; gives the batches it was asked for."""
    asked: list[int] = []
    encode = segmenter.sam.encode

    def limited(pixels: torch.Tensor) -> torch.Tensor:
        asked.append(len(pixels))
        if len(pixels) > n_images:
            raise error
        return encode(pixels)

    monkeypatch.setattr(segmenter.sam, "encode", limited)
    return asked


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "cudnn", "host"])
def test_batches_are_halved_until_they_fit_and_the_masks_are_the_same(
    segmenter: Segmenter,
    case: PreparedSlices,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    expected = predict_slices(segmenter, case, BOXES, PredictOptions(batch_size=1))
    assert expected.any() and not expected.all()
    asked = room_for(segmenter, 8, monkeypatch, error)
    options = PredictOptions(batch_size=6)
    with caplog.at_level(logging.WARNING):
        masks = predict_slices(segmenter, case, BOXES, options)
    assert asked == [24, 12, 4, 4, 4, 4, 4, 4, 4] and options.limit.slices == 1
    np.testing.assert_array_equal(masks, expected)
    assert "going on with 3" in caplog.text and "going on with 1" in caplog.text
    predict_slices(segmenter, case, BOXES, options)
    assert asked[9:] == [4] * 7, "what did not fit once is not tried again"


def test_a_single_slice_that_does_not_fit_is_an_error_of_its_case(
    segmenter: Segmenter, case: PreparedSlices, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(segmenter, 3, monkeypatch, OUT_OF_MEMORY[0])
    with pytest.raises(DataError, match=r"single slice.*predict\.amp") as caught:
        predict_slices(segmenter, case, BOXES, PredictOptions())
    assert (caught.value.case_id, caught.value.code) == ("a", "out_of_memory")


def test_other_errors_are_not_taken_for_it() -> None:
    def broken(chunk: list[int]) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches([1, 2], 2, broken, BatchLimit(), "a")


def test_a_second_prompt_needs_no_encoder(
    segmenter: Segmenter, case: PreparedSlices, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PredictOptions(batch_size=3)
    other = {k: np.array([[2.0, 2, 20, 20], [20.0, 8, 38, 44]]) for k in (1, 4, 6)}
    expected = [predict_slices(segmenter, case, boxes, options) for boxes in (BOXES, other)]
    embeddings = embed_case(segmenter, case, options)
    assert sorted(embeddings) == list(range(7)) and embeddings[0].shape == (4, 128, 8, 8)
    asked = room_for(segmenter, 0, monkeypatch, AssertionError("the encoder ran"))
    for boxes, masks in zip((BOXES, other), expected, strict=True):
        np.testing.assert_array_equal(predict_slices(segmenter, case, boxes, options, embeddings), masks)
    assert asked == []
    with pytest.raises(KeyError):
        predict_slices(segmenter, case, BOXES, options, {k: embeddings[k] for k in (0, 1)})
