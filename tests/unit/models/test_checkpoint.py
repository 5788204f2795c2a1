from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from medsam_lora import __version__
from medsam_lora.errors import AdapterError
from medsam_lora.models import checkpoint
from medsam_lora.models.checkpoint import FORMAT_VERSION, REQUIRED_METADATA, check_base, load_adapter, save_adapter

METADATA = {
    **dict.fromkeys(REQUIRED_METADATA, "x"),
    "method": "lora",
    "model_name": "vit_t",
    "base_sha256": "aa" * 32,
    "image_size": 1024,
    "method_options": {"rank": 8, "alpha": 8.0, "blocks": None},
    "modalities": ["t1n", "t1c"],
    "plan": {"crop": [138, 202], "note": "µ ≤ 1"},
}
TENSORS = {
    "encoder.a": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "decoder.b": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "fusion.scalar": torch.tensor(0.1),
    "empty": torch.zeros(0, 4),
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "adapter.safetensors"
    digest = save_adapter(path, TENSORS, METADATA)
    tensors, metadata = load_adapter(path)
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    versions = {"package_version": __version__, "format_version": FORMAT_VERSION, "content_sha256": digest}
    assert metadata == {**METADATA, **versions}


def test_an_adaptation_without_tensors(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a.safetensors", {}, METADATA)
    tensors, metadata = load_adapter(tmp_path / "a.safetensors")
    assert tensors == {}
    assert metadata["method"] == "lora"


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", TENSORS, METADATA)
    first = (tmp_path / "a").read_bytes()
    turned = {name: TENSORS[name].clone() for name in reversed(TENSORS)}
    # Neither the order, nor the memory layout, nor the file's name, nor a round trip changes a byte.
    turned["encoder.a"] = TENSORS["encoder.a"].t().contiguous().t()
    save_adapter(tmp_path / "b", turned, dict(reversed(METADATA.items())))
    save_adapter(tmp_path / "c", *load_adapter(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == first
    save_adapter(tmp_path / "d", {**TENSORS, "fusion.scalar": torch.tensor(0.2)}, METADATA)
    assert (tmp_path / "d").read_bytes() != first


def test_views_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    both = torch.arange(4.0)
    save_adapter(tmp_path / "a", {"x": both[:2], "y": both[2:], "z": both[:2]}, METADATA)
    tensors, _ = load_adapter(tmp_path / "a")
    assert [tensors[name].tolist() for name in "xyz"] == [[0, 1], [2, 3], [0, 1]]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, TENSORS, METADATA)
    whole = path.read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(data))
        with pytest.raises(AdapterError) as error:
            load_adapter(path)
        assert str(path) in str(error.value)


def test_a_flipped_bit_among_the_tensors_is_called_a_change(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, TENSORS, METADATA)
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"changed after saving.*Remedy: Copy"):
        load_adapter(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, TENSORS, METADATA)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(AdapterError, match=r"not a whole safetensors file.*Remedy: Copy"):
        load_adapter(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(AdapterError, match="no such adapter file"):
        load_adapter(path)
    with pytest.raises(AdapterError, match="no such adapter file"):
        load_adapter(tmp_path)
    torch.save(TENSORS, path)
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        load_adapter(path)
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(safetensors.torch.save(TENSORS, metadata))
        with pytest.raises(AdapterError, match="not an adapter of medsam-lora"):
            load_adapter(path)
    for text in ("{", "[]", "3", "{}"):
        path.write_bytes(safetensors.torch.save(TENSORS, {"medsam_lora": text}))
        with pytest.raises(AdapterError, match=r"not JSON|not a JSON mapping"):
            load_adapter(path)


def test_a_tampered_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, TENSORS, METADATA)
    _, metadata = load_adapter(path)
    path.write_bytes(safetensors.torch.save(TENSORS, {"medsam_lora": json.dumps({**metadata, "image_size": 512})}))
    with pytest.raises(AdapterError, match="changed after saving"):
        load_adapter(path)
    renamed = {name.replace("encoder.a", "encoder.c"): tensor for name, tensor in TENSORS.items()}
    path.write_bytes(safetensors.torch.save(renamed, {"medsam_lora": json.dumps(metadata)}))
    with pytest.raises(AdapterError, match="changed after saving"):
        load_adapter(path)


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", FORMAT_VERSION + 1)
        save_adapter(path, TENSORS, METADATA)
    with pytest.raises(AdapterError, match="adapter format 2, this version reads 1"):
        load_adapter(path)


def test_what_would_not_load_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, TENSORS, METADATA)
    before = path.read_bytes()
    bad_metadata = [
        ({k: v for k, v in METADATA.items() if k != "base_sha256"}, "lacks base_sha256"),
        ({**METADATA, "dice": float("nan")}, "cannot be written as JSON"),
        ({**METADATA, "plan": {Path("a")}}, "cannot be written as JSON"),
    ]
    for metadata, words in bad_metadata:
        with pytest.raises(AdapterError, match=words):
            save_adapter(path, TENSORS, metadata)
    for value in (float("nan"), float("inf")):
        with pytest.raises(AdapterError, match=r"fusion.scalar first.*diverged"):
            save_adapter(path, {**TENSORS, "fusion.scalar": torch.tensor(value)}, METADATA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_base_must_be_the_one_trained_on(tmp_path: Path) -> None:
    check_base(METADATA, "vit_t", "aa" * 32)
    check_base(METADATA, "vit_t", "aa" * 32, 1024)
    with pytest.raises(
        AdapterError, match=r"vit_t, not on vit_b \(.* is a{64}, this one a{64}\). Remedy: Set model.name=vit_t"
    ):
        check_base(METADATA, "vit_b", "aa" * 32)
    with pytest.raises(AdapterError, match=f"{'aa' * 32}, these are {'bb' * 32}"):
        check_base(METADATA, "vit_t", "bb" * 32)
    with pytest.raises(AdapterError, match="these are None"):
        check_base(METADATA, "vit_t", None)
    with pytest.raises(AdapterError, match="1024 px, the model is built at 512 px") as error:
        check_base(METADATA, "vit_t", "aa" * 32, 512, tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)


def test_the_grid_must_be_the_one_trained_on() -> None:
    check_base(METADATA, "vit_t", "aa" * 32, grid="padded")  # an adapter that says nothing
    check_base({**METADATA, "grid": "unpadded"}, "vit_t", "aa" * 32, grid="unpadded")
    for stored, built in (({}, "unpadded"), ({"grid": "unpadded"}, "padded")):
        with pytest.raises(AdapterError, match=f"on the {built} one.*Set model.grid={stored.get('grid', 'padded')}"):
            check_base({**METADATA, **stored}, "vit_t", "aa" * 32, grid=built)
