"""Every way a NIfTI file was seen to be broken, one test each; and files that are unusual but whole."""

from __future__ import annotations

import gzip
import logging
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_cases import AFFINE, SHAPE, save

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.io.examine import examine
from medsam_lora.io.nifti import read_header, read_label_map, read_volume, write_label_map

# Byte offsets of the NIfTI-1 header (nifti1.h).
DIM, DATATYPE, VOX_OFFSET, QFORM_CODE, QUATERN, SROW_X, MAGIC = 40, 70, 108, 252, 256, 280, 344
VOXELS = np.random.default_rng(0).integers(-300, 900, SHAPE).astype(np.int16)
# nibabel stops reading with the last voxel, but reads ahead: only a file of some size shows what it misses.
LARGE = np.random.default_rng(3).integers(-300, 900, (64, 64, 16)).astype(np.int16)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """The bytes of a good, uncompressed file."""
    return save(tmp_path / "good.nii", VOXELS).read_bytes()


def forged(content: bytes, offset: int, layout: str, *values: float) -> bytes:
    """The file with some bytes of its header changed."""
    changed = bytearray(content)
    struct.pack_into(f"<{layout}", changed, offset, *values)
    return bytes(changed)


def written(tmp_path: Path, content: bytes, name: str = "broken.nii") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def codes(path: Path, **options: bool) -> list[str | None]:
    return [fault.code for fault in examine(path, **options).faults]


def fault_of(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_volume(path)
    assert caught.value.path == path
    assert caught.value.remedy
    assert [fault.code for fault in examine(path).faults if fault.code == caught.value.code]
    return caught.value


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
def test_a_good_file_is_read_as_nibabel_reads_it(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name.lower(), VOXELS).rename(tmp_path / name)
    volume = read_volume(path)
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, VOXELS)
    np.testing.assert_array_equal(volume.geometry.affine, AFFINE)
    assert volume.geometry.shape == SHAPE
    assert codes(path) == []


# --- the stream ---------------------------------------------------------------------------------------------------


def test_a_gzip_cut_at_half_is_truncated(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.nii.gz", VOXELS).read_bytes()
    path = tmp_path / "cut.nii.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert fault_of(path).code == "truncated"


def test_a_gzip_cut_within_the_header_is_truncated(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.nii.gz", VOXELS).read_bytes()
    path = tmp_path / "cut.nii.gz"
    path.write_bytes(whole[:40])
    assert fault_of(path).code == "truncated"


def test_the_last_four_bytes_cut_are_noticed_though_every_voxel_is_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", LARGE)
    path.write_bytes(path.read_bytes()[:-4])
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), LARGE)  # nibabel does not notice
    assert fault_of(path).code == "truncated"


def test_a_wrong_checksum_is_noticed_though_every_voxel_is_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", LARGE)
    damaged = bytearray(path.read_bytes())
    damaged[-8] ^= 1  # the CRC-32 is in the last eight bytes, before the length
    path.write_bytes(damaged)
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), LARGE)
    fault = fault_of(path)
    assert fault.code == "unreadable"
    assert "incorrect data check" in fault.message


def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", VOXELS)
    whole = path.read_bytes()
    content, unnoticed = gzip.decompress(whole), 0
    for position in range(12, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        if not set(codes(path)) & {"unreadable", "truncated", "too_large"}:
            # A copy from another place with the same bytes is another stream of the same content.
            assert gzip.decompress(bytes(damaged)) == content, position
            unnoticed += 1
    assert unnoticed < 3


def test_a_plain_file_named_gz_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plain.nii.gz"
    path.write_bytes(content)
    fault = fault_of(path)
    assert fault.code == "unreadable"
    assert "not compressed" in fault.message
    assert "Rename it to .nii" in str(fault.remedy)


def test_a_compressed_file_not_named_gz_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "zipped.nii"
    path.write_bytes(gzip.compress(content))
    fault = fault_of(path)
    assert fault.code == "unreadable"
    assert "Rename it to .nii.gz" in str(fault.remedy)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.nii.gz", b"", "empty"),
        ("empty.nii", b"", "empty"),
        ("text.nii.gz", b"not an image", "not compressed with gzip"),
        ("text.nii", b"not an image", "not a readable NIfTI"),
        ("text.nii", b"not an image" * 99, "not a readable NIfTI"),
    ],
)
def test_what_is_no_nifti_file_is_unreadable(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    fault = fault_of(path)
    assert fault.code == "unreadable"
    assert words in fault.message


def test_a_missing_file(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "none.nii.gz").code == "missing_file"
    assert fault_of(tmp_path).code == "missing_file"  # a folder is no file


def test_a_plain_file_cut_short_is_truncated(tmp_path: Path, content: bytes) -> None:
    fault = fault_of(written(tmp_path, content[:-1]))
    assert fault.code == "truncated"
    assert f"{len(content) - 1} of {len(content)} bytes" in fault.message


@pytest.mark.parametrize(
    ("name", "junk_outside", "junk_inside"),
    [("a.nii.gz", b"junk", b""), ("a.nii.gz", b"", b"12345"), ("a.nii", b"", b"12345")],
)
def test_trailing_junk_is_a_warning_and_the_voxels_are_read(
    tmp_path: Path,
    content: bytes,
    caplog: pytest.LogCaptureFixture,
    name: str,
    junk_outside: bytes,
    junk_inside: bytes,
) -> None:
    path = written(tmp_path, content + junk_inside, name)
    path.write_bytes(path.read_bytes() + junk_outside)
    assert codes(path) == ["trailing_junk"]
    with caplog.at_level(logging.WARNING):
        volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, VOXELS)
    assert f"{len(junk_inside + junk_outside)} bytes follow the voxels" in caplog.text
    assert str(path) in caplog.text


def test_zero_padding_and_several_gzip_members_are_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "members.nii.gz"
    path.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]) + bytes(512))
    assert codes(path) == []
    np.testing.assert_array_equal(read_volume(path).array, VOXELS)


# --- the header ---------------------------------------------------------------------------------------------------


def test_a_header_that_claims_32767_cubed_is_refused_before_loading(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, forged(content, DIM + 2, "hhh", 32767, 32767, 32767), "huge.nii.gz")
    fault = fault_of(path)
    assert fault.code == "too_large"
    # 32767^3 voxels of 2 bytes are 65530.0 GiB
    assert "65530.0 GiB, over the cap of 2.0 GiB" in fault.message
    with pytest.raises(DataError, match="over the cap"):
        read_header(path)


def test_the_cap_counts_every_byte(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    size = 352 + 6 * 5 * 4 * 2
    assert len(content) == size
    assert read_volume(path, max_bytes=size).array.shape == SHAPE
    with pytest.raises(DataError, match="over the cap"):
        read_volume(path, max_bytes=size - 1)


def test_a_bomb_is_not_inflated_beyond_what_its_header_claims(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bomb.nii.gz"
    # 64 MiB of zeros behind the voxels, in some 64 KiB
    path.write_bytes(gzip.compress(content + bytes(64 * 2**20)))
    assert path.stat().st_size < 2**17
    fault = fault_of(path)
    assert fault.code == "too_large"
    assert "inflates to more than" in fault.message


def test_a_forged_voxel_offset_is_refused(tmp_path: Path, content: bytes) -> None:
    assert fault_of(written(tmp_path, forged(content, VOX_OFFSET, "f", 1e15))).code == "too_large"
    for offset in (float("inf"), float("nan"), -1000.0, 10.0):
        assert fault_of(written(tmp_path, forged(content, VOX_OFFSET, "f", offset))).code == "unreadable"


@pytest.mark.parametrize(
    ("offset", "layout", "values"),
    [
        (DATATYPE, "h", (999,)),
        (MAGIC, "4s", (b"xxxx",)),
        (DIM + 2, "h", (0,)),
        (DIM + 2, "h", (-4,)),
        (QFORM_CODE, "hhfff", (1, 0, 2.0, 2.0, 2.0)),
    ],
    ids=["data type", "magic", "empty axis", "negative axis", "quaternion without an sform"],
)
def test_a_senseless_header_is_unreadable(
    tmp_path: Path, content: bytes, offset: int, layout: str, values: tuple
) -> None:
    assert fault_of(written(tmp_path, forged(content, offset, layout, *values))).code == "unreadable"


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_voxels_that_are_no_intensities_are_unreadable(tmp_path: Path, dtype: np.dtype) -> None:
    path = save(tmp_path / "a.nii", np.zeros(SHAPE, dtype))
    assert "not intensities" in fault_of(path).message


def test_a_fourth_axis_of_length_one_is_dropped_and_a_longer_one_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "one.nii.gz", VOXELS[..., None])
    np.testing.assert_array_equal(read_volume(one).array, VOXELS)
    four = save(tmp_path / "four.nii.gz", np.repeat(VOXELS[..., None], 4, axis=3))
    fault = fault_of(four)
    assert fault.code == "not_3d"
    assert "(6, 5, 4, 4)" in fault.message
    two = save(tmp_path / "two.nii.gz", VOXELS[..., 0])
    assert fault_of(two).code == "not_3d"


# --- the affine ---------------------------------------------------------------------------------------------------


def test_no_affine_is_refused_though_nibabel_invents_one(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, forged(content, QFORM_CODE, "hh", 0, 0))
    assert np.isfinite(nib.load(path).affine).all()
    assert fault_of(path).code == "no_affine"


@pytest.mark.parametrize("row", [(float("nan"), 0, 0, 0), (0, 0, 0, 0)])
def test_an_affine_that_maps_nowhere_is_refused(tmp_path: Path, content: bytes, row: tuple) -> None:
    assert fault_of(written(tmp_path, forged(content, SROW_X, "ffff", *row))).code == "no_affine"


def test_a_qform_unlike_the_sform_is_a_warning_with_both_matrices(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    # x runs to the left (-1) in the qform; the sform is changed to run to the right from -7
    path = written(tmp_path, forged(content, SROW_X, "ffff", 1, 0, 0, -7))
    (fault,) = examine(path).faults
    assert fault.code == "qform_sform_mismatch"
    assert "qform [-1 0 0 0; 0 -1 0 4; 0 0 1 0]" in fault.message
    assert "sform [1 0 0 -7; 0 -1 0 4; 0 0 1 0]" in fault.message
    with caplog.at_level(logging.WARNING):
        volume = read_volume(path)
    assert volume.geometry.affine[0].tolist() == [1, 0, 0, -7]  # the sform, as nibabel and ITK prefer it
    assert "qform" in caplog.text


def test_a_qform_that_is_no_rotation_beside_a_good_sform_is_a_warning(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, forged(content, QUATERN, "fff", 2.0, 2.0, 2.0))
    (fault,) = examine(path).faults
    assert fault.code == "qform_sform_mismatch"
    assert "not a rotation" in fault.message


def test_an_oblique_affine_is_no_mismatch(tmp_path: Path) -> None:
    # float32 quaternions cannot hold a rotation exactly
    angle = np.deg2rad(17.3)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([0.9, 1.1, 3.0])
    affine[:3, 3] = [-91.7, 120.3, 4.4]
    path = save(tmp_path / "oblique.nii.gz", np.zeros((240, 240, 20), np.uint8), affine)
    assert codes(path) == []


def test_a_sheared_affine_is_refused(tmp_path: Path) -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    image = nib.Nifti1Image(VOXELS, sheared)  # a qform cannot hold a shear: sform only
    nib.save(image, tmp_path / "sheared.nii.gz")
    assert fault_of(tmp_path / "sheared.nii.gz").code == "sheared_affine"


def test_every_fault_of_a_file_is_found_at_once(tmp_path: Path, content: bytes) -> None:
    broken = forged(forged(content, SROW_X, "ffff", 1, 0.5, 0, 0), DIM + 6, "h", 5)
    assert codes(written(tmp_path, broken)) == ["sheared_affine", "qform_sform_mismatch", "truncated"]


# --- the voxels ---------------------------------------------------------------------------------------------------


def test_float_voxels_keep_nan_and_infinity_for_the_caller_to_judge(tmp_path: Path) -> None:
    values = VOXELS.astype(np.float32)
    values[1, 2, 3], values[0, 0, 0] = np.nan, np.inf
    volume = read_volume(save(tmp_path / "a.nii.gz", values))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, values)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(np.uint8, np.int16), (np.int32, np.int16), (np.float64, np.float32), (np.uint16, np.int16)],
)
def test_integers_that_fit_become_int16_and_the_rest_float32(tmp_path: Path, stored: type, dtype: type) -> None:
    values = np.abs(VOXELS % 200).astype(stored)
    volume = read_volume(save(tmp_path / "a.nii.gz", values))
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, values)


def test_integers_that_do_not_fit_int16_become_float32_unchanged(tmp_path: Path) -> None:
    values = np.abs(VOXELS).astype(np.int32)
    values[0, 0, 0] = 32768
    volume = read_volume(save(tmp_path / "a.nii.gz", values))
    assert volume.array.dtype == np.float32
    assert volume.array[0, 0, 0] == 32768.0
    np.testing.assert_array_equal(volume.array, values)


def test_scaled_integers_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    save(path, VOXELS)
    path.write_bytes(forged(path.read_bytes(), 112, "ff", 0.5, 3.0))  # scl_slope, scl_inter
    volume = read_volume(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, VOXELS * 0.5 + 3)


# --- label maps ---------------------------------------------------------------------------------------------------


def test_labels_written_as_scaled_floats_come_back_as_the_same_integers(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 4, SHAPE)
    image = nib.Nifti1Image(labels.astype(np.float64), AFFINE)
    image.header.set_data_dtype(np.uint8)  # makes nibabel store a slope of 3 / 255
    nib.save(image, tmp_path / "seg.nii.gz")
    loaded = np.asanyarray(nib.load(tmp_path / "seg.nii.gz").dataobj)
    assert not np.array_equal(loaded, labels)  # 0.99999994 for 1: the trap
    volume = read_label_map(tmp_path / "seg.nii.gz")
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, labels)


def test_labels_between_integers_are_refused_with_count_and_values(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[0, 0, 0], labels[0, 0, 1], labels[1, 0, 0] = 0.5, 1.75, 1.0005
    path = save(tmp_path / "seg.nii.gz", labels)
    with pytest.raises(DataError, match=r"2 voxels, such as 0\.5, 1\.75") as caught:
        read_label_map(path)
    assert caught.value.code == "not_integer_labels"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_labels_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[3, 3, 3] = value
    path = save(tmp_path / "seg.nii.gz", labels)
    assert codes(path, label_map=True) == ["not_integer_labels"]


@pytest.mark.parametrize("stored", [np.int64, np.uint32, np.float64])
def test_labels_too_large_for_int16_do_not_wrap_round_to_a_real_label(tmp_path: Path, stored: type) -> None:
    labels = np.zeros(SHAPE, stored)
    labels[0, 0, 0] = 65537  # 1 in 16 bits
    image = nib.Nifti1Image(labels, AFFINE, dtype=stored)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "seg.nii.gz")
    assert read_label_map(tmp_path / "seg.nii.gz").array[0, 0, 0] == 65537


def test_int64_labels_are_read_and_written(tmp_path: Path) -> None:
    labels = np.random.default_rng(2).integers(0, 4, SHAPE)
    assert labels.dtype == np.int64
    geometry = Geometry(SHAPE, AFFINE)
    write_label_map(tmp_path / "seg.nii.gz", labels, geometry)
    image = nib.load(tmp_path / "seg.nii.gz")
    assert image.get_data_dtype() == np.uint8
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
    np.testing.assert_array_equal(image.header.get_qform(), AFFINE)
    np.testing.assert_array_equal(read_label_map(tmp_path / "seg.nii.gz").array, labels)
    first = (tmp_path / "seg.nii.gz").read_bytes()
    write_label_map(tmp_path / "seg.nii.gz", labels, geometry)
    assert (tmp_path / "seg.nii.gz").read_bytes() == first


def test_reading_a_header_loads_no_voxel(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content[:352])
    _, geometry = read_header(path)
    assert geometry.shape == SHAPE
    assert fault_of(path).code == "truncated"
