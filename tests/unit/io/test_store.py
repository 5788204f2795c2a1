"""The prepared store: what is written comes back, and what is damaged is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from medsam_lora.errors import PreparedError
from medsam_lora.geometry import Geometry
from medsam_lora.io import store
from medsam_lora.io.store import PREPARE_COLUMNS, open_case, open_store, read_index, update_index, write_case
from medsam_lora.io.tables import write_table
from medsam_lora.records import PreparedSlices


def make_slices(case_id: str = "a", n: int = 3, dtype: type = np.int16, with_label: bool = True) -> PreparedSlices:
    generator = np.random.default_rng(1)
    affine = np.array([[1 / 3, 0, 0, 0.1], [0, 0.7, 0, -5], [0, 0, 1.1, 2], [0, 0, 0, 1]])
    grid = Geometry((5, 6, 9), affine)
    return PreparedSlices(
        case_id=case_id,
        patient_id="p-" + case_id,
        split="train",
        modalities=("t1n", "t2f"),
        image=generator.integers(-50, 900, (n, 2, 5, 6)).astype(dtype),
        label=generator.integers(0, 4, (n, 5, 6)).astype(np.uint8) if with_label else None,
        ks=tuple(range(1, 1 + n)),
        mean=generator.normal(300, 1, (n, 2)),
        std=generator.uniform(1, 2, (n, 2)),
        voxels="nonzero",
        native=Geometry((6, 5, 9), grid.affine[:, [1, 0, 2, 3]]),
        crop=grid,
        report={"brain_voxels": 10, "brain_voxels_lost": 1, "tumour_voxels": None, "tumour_voxels_lost": None},
    )


def assert_equal(found: PreparedSlices, expected: PreparedSlices) -> None:
    for field in dataclasses.fields(PreparedSlices):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        elif isinstance(b, Geometry):
            assert a.shape == b.shape and (a.affine == b.affine).all(), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("with_label", [True, False])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, dtype, with_label):
    slices = make_slices(dtype=dtype, with_label=with_label)
    write_case(tmp_path / "a", slices, {"source_sha256": "f" * 64})
    found = open_case(tmp_path / "a", check_hash=True)
    assert_equal(found, slices)
    assert isinstance(found.image, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.image[0, 0, 0, 0] = 1
    index = read_index(tmp_path / "a")
    assert index["source_sha256"] == "f" * 64
    assert re.fullmatch("[0-9a-f]{64}", index["arrays"]["image.npy"]["sha256"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"], "no temporary folder is left"


def test_a_case_without_slices_comes_back_too(tmp_path):
    slices = make_slices(n=0)
    write_case(tmp_path / "a", slices, {})
    assert_equal(open_case(tmp_path / "a", check_hash=True), slices)


def test_an_older_case_is_replaced_whole(tmp_path):
    write_case(tmp_path / "a", make_slices(n=4), {})
    newer = make_slices(n=2, with_label=False)
    write_case(tmp_path / "a", newer, {})
    assert_equal(open_case(tmp_path / "a"), newer)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["image.npy", "index.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("older", [True, False])
def test_an_interruption_leaves_the_old_case_or_none(tmp_path, monkeypatch, older):
    if older:
        write_case(tmp_path / "a", make_slices(n=4), {})
    saved = []

    def interrupted(path: Path, array: np.ndarray) -> dict:
        saved.append(path.name)
        if len(saved) == 2:
            raise KeyboardInterrupt
        np.save(path, array)
        return {}

    monkeypatch.setattr(store, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_case(tmp_path / "a", make_slices(n=2), {})
    assert saved == ["image.npy", "label.npy"], "it was interrupted with one array written"
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if older else [])
    if older:
        assert_equal(open_case(tmp_path / "a", check_hash=True), make_slices(n=4))


def test_update_index_changes_what_it_is_told_only(tmp_path):
    write_case(tmp_path / "a", make_slices(), {"source_sha256": "1"})
    update_index(tmp_path / "a", {"split": "test"})
    assert_equal(open_case(tmp_path / "a", check_hash=True), dataclasses.replace(make_slices(), split="test"))
    assert read_index(tmp_path / "a")["source_sha256"] == "1"


def damage_byte(folder: Path) -> None:
    data = bytearray((folder / "image.npy").read_bytes())
    data[-7] ^= 4
    (folder / "image.npy").write_bytes(data)


def damage_length(folder: Path) -> None:
    data = (folder / "label.npy").read_bytes()
    (folder / "label.npy").write_bytes(data[:-1])


def damage_header(folder: Path) -> None:
    data = (folder / "image.npy").read_bytes()
    (folder / "image.npy").write_bytes(b"\x00" + data[1:])


def damage_shape(folder: Path) -> None:
    data = (folder / "image.npy").read_bytes()
    assert data.count(b"(3, 2, 5, 6)") == 1
    (folder / "image.npy").write_bytes(data.replace(b"(3, 2, 5, 6)", b"(3, 2, 6, 5)"))


def damage_type(folder: Path) -> None:
    data = (folder / "image.npy").read_bytes()
    (folder / "image.npy").write_bytes(data.replace(b"<i2", b"<u2"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "image.npy").unlink(), "array is missing"),
        (damage_length, "the index notes"),
        (damage_header, "not a readable array"),
        (damage_shape, r"\(3, 2, 6, 5\), the index notes int16 \(3, 2, 5, 6\)"),
        (damage_type, "uint16"),
        (lambda folder: (folder / "index.json").unlink(), "not prepared"),
        (lambda folder: (folder / "index.json").write_text("{"), "index is damaged"),
        (lambda folder: (folder / "index.json").write_text("[]"), "index is damaged"),
        (lambda folder: (folder / "index.json").write_text('{"case_id": "a", "arrays": {}}'), "index is damaged"),
    ],
)
def test_damage_is_told_with_the_file_and_the_remedy(tmp_path, damage, message):
    write_case(tmp_path / "a", make_slices(), {})
    damage(tmp_path / "a")
    with pytest.raises(PreparedError, match=message) as caught:
        open_case(tmp_path / "a")
    assert caught.value.path is not None and tmp_path in caught.value.path.parents
    assert "medsam-lora prepare" in str(caught.value.remedy)


def test_a_flipped_bit_is_found_by_the_hash(tmp_path):
    write_case(tmp_path / "a", make_slices(), {})
    damage_byte(tmp_path / "a")
    open_case(tmp_path / "a")  # what a plain look does not see
    with pytest.raises(PreparedError, match="changed since it was written") as caught:
        open_case(tmp_path / "a", check_hash=True)
    assert caught.value.case_id == "a"


def test_a_pickle_is_never_loaded(tmp_path):
    write_case(tmp_path / "a", make_slices(), {})
    path = tmp_path / "a" / "image.npy"
    np.save(path, np.array([{"code": "anything"}], dtype=object), allow_pickle=True)
    index = read_index(tmp_path / "a")
    index["arrays"]["image.npy"] |= {"bytes": path.stat().st_size, "shape": [1], "dtype": "object"}
    (tmp_path / "a" / "index.json").write_text(json.dumps(index))
    with pytest.raises(PreparedError, match="not a readable array"):
        open_case(tmp_path / "a")


def test_a_store_is_what_its_table_lists_and_not_what_lies_there(tmp_path):
    for case_id in ("a", "b", "c", "left-over"):
        write_case(tmp_path / case_id, make_slices(case_id), {})
    rows = [("c", "done"), ("bad", "failed"), ("a", "skipped")]
    write_table(tmp_path / "prepare.csv", PREPARE_COLUMNS, [{"case_id": i, "status": s} for i, s in rows])
    assert [case.case_id for case in open_store(tmp_path)] == ["c", "a"]
    assert [case.case_id for case in open_store(tmp_path, ["b"], check_hash=True)] == ["b"]
    with pytest.raises(PreparedError, match="not prepared"):
        open_store(tmp_path, ["absent"])
    with pytest.raises(PreparedError, match="no such file"):
        open_store(tmp_path / "nowhere")
