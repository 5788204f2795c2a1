"""Cached embeddings: the same results, nothing where the encoder changes, room that is kept to."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.labels import MODALITIES
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import Segmenter

ROOM = 2**26
BOXES = [np.array([[4.0, 6, 30, 40]], np.float32), np.array([[8.0, 8, 20, 30], [20, 10, 36, 44]], np.float32)]


def segmenter(method: str = "decoder_only", seed: int = 0, name: str = "vit_nano") -> Segmenter:
    model = ModelConfig(name=name, weights="random", image_size=64, seed=seed)
    config = MethodConfig(name=method, rank=2)
    return build_segmenter(model, config, FusionConfig(), MODALITIES, ["WT"], 0, torch.device("cpu")).eval()


def slices(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 4, 40, 48, generator=torch.Generator().manual_seed(seed))


def calls(model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that the encoder was given, call by call."""
    seen: list[int] = []
    encode = model.sam.encode

    def note(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model.sam, "encode", note)
    return seen


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_the_results_are_the_same_and_the_encoder_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    model, z = segmenter(), slices()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
        plain = model(z, BOXES)
        assert model.use_cache(tmp_path, ROOM, amp)
        seen = calls(model, monkeypatch)
        first, second = model(z, BOXES), model(z, BOXES)
        alone = model(z[1:], BOXES[1:])
    assert seen == [8]
    assert torch.equal(first.logits, plain.logits) and torch.equal(second.logits, plain.logits)
    torch.testing.assert_close(alone.logits, plain.logits[1:], rtol=1e-2 if amp == "bf16" else 1e-4, atol=1e-3)
    assert model.cache is not None and (model.cache.hits, model.cache.misses) == (3, 2)


def test_an_embedding_has_one_layout_whether_computed_or_read(tmp_path: Path) -> None:
    """TinyViT's are channels-last when computed; the decoder's bfloat16 products depend on it."""
    model, z = segmenter(name="vit_t"), slices()
    model.use_cache(tmp_path, ROOM, "none")
    with torch.no_grad():
        computed, read = model.embed(z), model.embed(z)
    assert torch.equal(computed, read) and computed.stride() == read.stride()


def test_only_what_is_missing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = segmenter(), slices()
    model.use_cache(tmp_path, ROOM, "none")
    model(z[:1], BOXES[:1])
    seen = calls(model, monkeypatch)
    both = model(z, BOXES)
    assert seen == [4]
    model.cache = None
    torch.testing.assert_close(both.logits, model(z, BOXES).logits, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_decoder_are_the_same(tmp_path: Path) -> None:
    model, z = segmenter(), slices()
    gradients = []
    for _ in range(3):  # without, writing, reading
        model.zero_grad()
        model(z, BOXES).logits.square().mean().backward()
        parameters = model.trainable_groups()["decoder"]
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        model.use_cache(tmp_path, ROOM, "none")
    assert len(gradients[0]) > 10
    for plain, *cached in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in cached)


def test_methods_share_entries_and_other_weights_sizes_and_slices_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = slices()
    segmenter().use_cache(tmp_path, ROOM, "none")
    first = segmenter()
    first.use_cache(tmp_path, ROOM, "none")
    first(z, BOXES)
    same = segmenter("zero_shot")
    same.use_cache(tmp_path, ROOM, "none")
    seen = calls(same, monkeypatch)
    same(z, BOXES)
    assert seen == []
    same(z.flip(2), BOXES)  # mirrored slices are others
    same(z[:, :3], BOXES, present=[0, 1, 2])
    same(z[:, :3], BOXES, present=[1, 2, 3])  # the same voxels as another modality are another question
    assert seen == [8, 6, 6]
    other = segmenter(seed=5)
    other.use_cache(tmp_path, ROOM, "none")
    seen = calls(other, monkeypatch)
    other(z, BOXES)
    assert seen == [8]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_method_that_changes_the_encoder_caches_nothing(tmp_path: Path, method: str) -> None:
    model = segmenter(method)
    assert not model.use_cache(tmp_path, ROOM, "none") and model.cache is None
    model(slices(), BOXES)
    assert not list(tmp_path.rglob("*.npy"))


def test_the_room_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = segmenter(), slices()
    one = 4 * 128 * 8 * 8 * 4  # modalities, channels, grid, bytes
    assert not model.use_cache(tmp_path, 0, "none")
    model.use_cache(tmp_path, int(1.5 * one) + 200, "none")
    model(z, BOXES)
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    seen = calls(model, monkeypatch)
    model(z, BOXES)
    assert seen == [4]
    again = segmenter()
    again.use_cache(tmp_path, int(1.5 * one) + 200, "none")
    again(slices(2), BOXES)
    assert len(list(tmp_path.rglob("*.npy"))) == 1, "what another run wrote counts"


def test_what_is_read_ahead_is_not_read_again_and_what_came_since_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, z = segmenter(), slices()
    plain = model(z, BOXES)
    assert model.read_ahead(z) is None
    model.use_cache(tmp_path, ROOM, "none")
    early = model.read_ahead(z)
    assert early is not None and early.entries == [None] * len(z)
    model(z, BOXES)
    assert torch.equal(model(z, BOXES, ahead=early).logits, plain.logits), "computed meanwhile"
    ahead = model.read_ahead(z)
    assert model.cache is not None and (model.cache.hits, model.cache.misses) == (2 * len(z), len(z))
    monkeypatch.setattr(type(model.cache), "read", lambda *_: pytest.fail("read again"))
    assert torch.equal(model(z, BOXES, ahead=ahead).logits, plain.logits)


@pytest.mark.parametrize("damage", ["empty", "header", "cut", "no check", "zeros", "a bit"])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    model, z = segmenter(), slices()
    plain = model(z, BOXES)
    model.use_cache(tmp_path, ROOM, "none")
    model(z, BOXES)
    assert model.cache is not None
    for path in tmp_path.rglob("*.npy"):
        whole = path.read_bytes()
        flipped = whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:]
        zeros = whole[:128] + bytes(len(whole) - 128)
        cut = {"empty": b"", "header": whole[:90], "cut": whole[:200], "no check": whole[:-4]}
        path.write_bytes({**cut, "zeros": zeros, "a bit": flipped}[damage])
    for hits in (0, len(z)):
        before = model.cache.hits
        assert torch.equal(model(z, BOXES).logits, plain.logits)
        assert model.cache.hits - before == hits, "mended the first time, found the second"
    sizes = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))
    assert damage != "a bit" or model.cache.bytes == sizes


def test_what_a_killed_writer_left_is_counted_and_in_time_removed(tmp_path: Path) -> None:
    model = segmenter()
    (tmp_path / "other").mkdir()
    young, old = tmp_path / "other" / "a.f32.1.partial", tmp_path / "other" / "b.f32.2.partial"
    for path in (young, old):
        path.write_bytes(bytes(1000))
    os.utime(old, (0, 0))
    model.use_cache(tmp_path, ROOM, "none")
    assert young.exists() and not old.exists()
    assert model.cache is not None and model.cache.bytes == 1000


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk: said once, nothing half-written left, and the results are the same."""
    model, z = segmenter(), slices()
    plain = model(z, BOXES)

    def full(handle: object, array: np.ndarray) -> None:
        handle.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medsam_lora.models.embedding_cache.np.save", full)
    model.use_cache(tmp_path, ROOM, "none")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(model(z, BOXES).logits, plain.logits)
    assert caplog.text.count("No space left on device") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
