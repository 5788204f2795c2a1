"""A case is read whole, on one grid with canonical labels, or refused with the reason."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_cases import AFFINE, SHAPE, SUFFIXES_2018, save, voxels, write_case

from medsam_lora.errors import DataError
from medsam_lora.io.case import read_case
from medsam_lora.io.checks import check_case
from medsam_lora.io.manifest import discover
from medsam_lora.records import CaseRecord

CASE = "BraTS-MEN-00001-000"
OLD = "Brats18_CBICA_ABM_1"


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return write_case(tmp_path, CASE)


def only(root: Path) -> CaseRecord:
    (record,) = discover(root)
    return record


def test_a_case_is_read_in_channel_order(tmp_path: Path, paths: dict[str, Path]) -> None:
    case = read_case(only(tmp_path), tmp_path, ["t2w", "t1n", "t2f", "t1c"])
    assert case.modalities == ("t1n", "t1c", "t2f", "t2w")
    assert case.image.dtype == np.int16
    assert case.image.shape == (4, *SHAPE)
    for channel, key in zip(case.image, case.modalities, strict=True):
        np.testing.assert_array_equal(channel, voxels(CASE, key))
    assert case.geometry.shape == SHAPE
    np.testing.assert_array_equal(case.geometry.affine, AFFINE)
    assert case.label_map is not None
    assert case.label_map.dtype == np.uint8
    np.testing.assert_array_equal(case.label_map, np.asanyarray(nib.load(paths["seg"]).dataobj))


def test_labels_of_2018_become_canonical(tmp_path: Path) -> None:
    paths = write_case(tmp_path, OLD, suffixes=SUFFIXES_2018)
    stored = np.asanyarray(nib.load(paths["seg"]).dataobj)
    assert set(np.unique(stored)) == {0, 1, 2, 4}
    label_map = read_case(only(tmp_path), tmp_path).label_map
    np.testing.assert_array_equal(label_map, np.where(stored == 4, 3, stored))


def test_one_float_modality_makes_the_image_float32(tmp_path: Path, paths: dict[str, Path]) -> None:
    save(paths["t2f"], voxels(CASE, "t2f") + np.float32(0.25))
    case = read_case(only(tmp_path), tmp_path)
    assert case.image.dtype == np.float32
    np.testing.assert_array_equal(case.image[2], voxels(CASE, "t2f") + np.float32(0.25))
    np.testing.assert_array_equal(case.image[3], voxels(CASE, "t2w"))
    assert read_case(only(tmp_path), tmp_path, ["t1n", "t2w"]).image.dtype == np.int16


def test_a_case_without_a_reference_has_no_label_map(tmp_path: Path, paths: dict[str, Path]) -> None:
    paths["seg"].unlink()
    assert read_case(only(tmp_path), tmp_path).label_map is None


def test_missing_modalities_are_refused_unless_allowed(tmp_path: Path, paths: dict[str, Path]) -> None:
    paths["t1n"].unlink()
    paths["t2w"].unlink()
    with pytest.raises(DataError, match="lists no t1n") as caught:
        read_case(only(tmp_path), tmp_path)
    assert (caught.value.code, caught.value.case_id) == ("missing_modality", CASE)
    case = read_case(only(tmp_path), tmp_path, allow_missing=True)
    assert case.modalities == ("t1c", "t2f")
    np.testing.assert_array_equal(case.image[1], voxels(CASE, "t2f"))
    with pytest.raises(DataError, match="lists no t1n"):
        read_case(only(tmp_path), tmp_path, ["t1n"], allow_missing=True)  # nothing would be left
    assert read_case(only(tmp_path), tmp_path, ["t1c", "t2f"]).image.shape == (2, *SHAPE)


def test_nonfinite_voxels_are_refused_or_become_zero(tmp_path: Path, paths: dict[str, Path]) -> None:
    values = voxels(CASE, "t1c").astype(np.float32)
    values[0, 1, 2], values[5, 4, 3] = np.nan, -np.inf
    save(paths["t1c"], values)
    with pytest.raises(DataError, match=r"2 voxels are NaN or infinite, the first at \(0, 1, 2\)") as caught:
        read_case(only(tmp_path), tmp_path)
    assert caught.value.code == "nonfinite"
    image = read_case(only(tmp_path), tmp_path, nonfinite="zero").image[1]
    assert (image[0, 1, 2], image[5, 4, 3]) == (0, 0)
    values[0, 1, 2], values[5, 4, 3] = 0, 0
    np.testing.assert_array_equal(image, values)


@pytest.mark.parametrize("modalities", [[], ["t1n", "t1n"], ["t1"]])
def test_senseless_modalities_are_a_fault_of_the_caller(
    tmp_path: Path, paths: dict[str, Path], modalities: list[str]
) -> None:
    with pytest.raises(ValueError, match="modalities"):
        read_case(only(tmp_path), tmp_path, modalities)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def crop(path: Path) -> None:
    save(path, np.asanyarray(nib.load(path).dataobj)[:, 1:])


def shift(path: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 3] = 0.01
    save(path, np.asanyarray(nib.load(path).dataobj), affine)


def blank(path: Path) -> None:
    save(path, np.zeros(SHAPE, np.int16))


def label_of_2018(path: Path) -> None:
    save(path, voxels(OLD, "seg", et=4))


@pytest.mark.parametrize(
    ("spoil", "key", "code"),
    [
        (Path.unlink, "t2f", "missing_file"),
        (cut, "t2f", "truncated"),
        (cut, "seg", "truncated"),
        (crop, "t1c", "shape_mismatch"),
        (crop, "seg", "shape_mismatch"),
        (shift, "t2w", "affine_mismatch"),
        (blank, "t1n", "all_zero"),
        (label_of_2018, "seg", "unexpected_label"),
    ],
)
def test_what_verify_calls_an_error_is_refused(
    tmp_path: Path, paths: dict[str, Path], spoil: Callable[[Path], None], key: str, code: str
) -> None:
    record = only(tmp_path)
    spoil(paths[key])
    with pytest.raises(DataError) as caught:
        read_case(record, tmp_path)
    error = caught.value
    assert (error.code, error.case_id, error.path) == (code, CASE, paths[key])
    assert error.remedy
    if key != "seg":
        others = [m for m in ("t1n", "t1c", "t2f", "t2w") if m != key]
        assert read_case(record, tmp_path, others).modalities == tuple(others)  # a file not asked for is not read


def test_warnings_do_not_stop_a_case(tmp_path: Path, paths: dict[str, Path]) -> None:
    paths["t1n"].write_bytes(paths["t1n"].read_bytes() + b"junk")
    blank(paths["seg"])
    record = only(tmp_path)
    found = check_case(record, tmp_path).findings
    assert [(f.code, f.severity) for f in found] == [("trailing_junk", "warning"), ("empty_reference", "warning")]
    label_map = read_case(record, tmp_path).label_map
    assert label_map is not None
    assert not label_map.any()


def test_the_record_itself_is_judged(tmp_path: Path, paths: dict[str, Path]) -> None:
    record = only(tmp_path)
    with pytest.raises(DataError) as caught:
        read_case(replace(record, label_convention="brats2020"), tmp_path)
    assert caught.value.code == "unknown_convention"
    with pytest.raises(DataError) as caught:
        read_case(replace(record, files={**record.files, "t1c": "../x.nii.gz"}), tmp_path)
    assert caught.value.code == "path_outside_root"


def test_the_odd_file_out_is_named_even_if_it_is_the_first(tmp_path: Path, paths: dict[str, Path]) -> None:
    crop(paths["t1n"])
    found = check_case(only(tmp_path), tmp_path).findings
    assert [(f.code, Path(f.file).name) for f in found] == [("shape_mismatch", f"{CASE}-t1n.nii.gz")]


@pytest.mark.parametrize(("offset_mm", "clean"), [(0.0009, True), (0.0011, False)])
def test_affines_agree_within_a_thousandth_of_a_voxel(
    tmp_path: Path, paths: dict[str, Path], offset_mm: float, clean: bool
) -> None:
    affine = AFFINE.copy()
    affine[2, 3] = offset_mm  # spacing 1 mm
    save(paths["t2f"], voxels(CASE, "t2f"), affine)
    codes = [f.code for f in check_case(only(tmp_path), tmp_path).findings]
    assert codes == ([] if clean else ["affine_mismatch"])


def test_the_cap_is_the_callers(tmp_path: Path, paths: dict[str, Path]) -> None:
    size = len(gzip.decompress(paths["t1n"].read_bytes()))
    assert read_case(only(tmp_path), tmp_path, max_bytes=size).image.shape == (4, *SHAPE)
    with pytest.raises(DataError) as caught:
        read_case(only(tmp_path), tmp_path, max_bytes=size - 1)
    assert caught.value.code == "too_large"
