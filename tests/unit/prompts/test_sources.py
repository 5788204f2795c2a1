"""Boxes from the reference and from tables, and their way to another grid."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.errors import DataError, ManifestError
from medsam_lora.geometry import Geometry, place
from medsam_lora.io.tables import BOX_COLUMNS
from medsam_lora.labels import region_mask
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.prompts.sources import (
    COLUMNS,
    fill_boxes,
    on_grid,
    read_box_table,
    reference_boxes,
    write_box_table,
)
from medsam_lora.records import SliceBox

RAS = Geometry((14, 12, 9), np.diag([1.0, 1.0, 2.0, 1.0]))
HEADER = "case_id,k,i0,j0,i1,j1\n"


def stored_as(codes: str) -> Geometry:
    """The same voxels as RAS, in a file of another orientation."""
    here = nib.orientations.io_orientation(RAS.affine)
    change = nib.orientations.ornt_transform(here, nib.orientations.axcodes2ornt(codes))
    shape = tuple(int(RAS.shape[i]) for i in np.argsort(change[:, 0]))
    return Geometry(shape, RAS.affine @ nib.orientations.inv_ornt_aff(change, RAS.shape))


def label_map(seed: int = 0) -> np.ndarray:
    """Two blobs and some stray voxels in slices 2 to 6."""
    labels = np.zeros(RAS.shape, np.uint8)
    labels[2:5, 3:8, 2:5] = 2
    labels[8:12, 1:4, 4:7] = 3
    labels[3, 4, 3] = 1
    labels[np.random.default_rng(seed).random(RAS.shape) < 0.01] = 2
    labels[:, :, [0, 1, 7, 8]] = 0
    labels[[0, 13]] = 0  # the crop of the tests keeps 1 to 12
    return labels


def expected_boxes(kind: str, crop: tuple[int, int] = (0, 0)) -> dict[int, list[list[float]]]:
    """Boxes made directly on the RAS grid: the oracle."""
    mask = region_mask(label_map(), "WT")
    boxes = {k: boxes_from_mask(mask[:, :, k], kind) for k in range(RAS.shape[2])}
    return {k: sorted((b - (*crop, *crop)).tolist()) for k, b in boxes.items() if len(b)}


def as_lists(boxes: dict[int, np.ndarray]) -> dict[int, list[list[float]]]:
    return {k: sorted(b.tolist()) for k, b in boxes.items()}


@pytest.mark.parametrize("kind", ["union", "per_component"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ARS", "PLI", "LAI"])
def test_reference_boxes_reach_the_oriented_crop_exactly(codes, kind):
    native = stored_as(codes)
    boxes = reference_boxes(place(label_map(), RAS, native), native, "WT", kind)
    crop = RAS.cropped((1, 0, 0), (13, 12, 9))
    assert as_lists(on_grid(boxes, native, crop)) == expected_boxes(kind, (1, 0))


@pytest.mark.parametrize("codes", ["PSR", "SPL", "RIA", "IRA"])
def test_files_whose_third_axis_is_not_transverse_give_the_same_union_boxes(codes):
    native = stored_as(codes)
    boxes = reference_boxes(place(label_map(), RAS, native), native, "WT", "union")
    assert as_lists(on_grid(boxes, native, RAS)) == expected_boxes("union")
    assert [b.k for b in boxes] == sorted(b.k for b in boxes)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "IRA"])
def test_the_filled_floor_is_the_same_in_every_orientation(codes):
    native = stored_as(codes)
    boxes = reference_boxes(place(label_map(), RAS, native), native, "WT")
    floor = np.zeros(RAS.shape, bool)
    for k, own in expected_boxes("union").items():
        for i0, j0, i1, j1 in np.array(own, int):
            floor[i0:i1, j0:j1, k] = True
    np.testing.assert_array_equal(place(fill_boxes(boxes, native), native, RAS), floor)


def test_boxes_per_component_are_refused_where_they_cannot_be_told_apart():
    native = stored_as("PSR")
    with pytest.raises(DataError, match="axis 1") as caught:
        reference_boxes(place(label_map(), RAS, native), native, "WT", "per_component")
    assert "prompt.boxes=union" in str(caught.value.remedy)


def test_regions_and_smallest_components_are_respected():
    labels = np.zeros(RAS.shape, np.uint8)
    labels[2:4, 2:4, 5] = 3
    labels[6, 6, 5] = 2
    assert reference_boxes(labels, RAS, "ET") == [SliceBox(5, 2, 2, 4, 4)]
    assert reference_boxes(labels, RAS, "WT", "per_component", 2) == [SliceBox(5, 2, 2, 4, 4)]
    assert reference_boxes(labels, RAS, "WT") == [SliceBox(5, 2, 2, 7, 7)]
    assert reference_boxes(np.zeros_like(labels), RAS, "WT") == []


def test_boxes_are_clipped_to_the_target_and_dropped_outside():
    crop = RAS.cropped((4, 3, 2), (10, 9, 6))
    boxes = [
        SliceBox(3, 2, 4, 6, 20),  # clipped below along i and above along j
        SliceBox(3, 0, 4, 4, 6),  # ends where the crop begins
        SliceBox(1, 5, 5, 6, 6),  # slice before the crop
        SliceBox(6, 5, 5, 6, 6),  # slice after it
        SliceBox(5, 4.5, 3.25, 5, 4),
    ]
    assert as_lists(on_grid(boxes, RAS, crop)) == {1: [[0.0, 1.0, 2.0, 6.0]], 3: [[0.5, 0.25, 1.0, 1.0]]}


def test_where_the_third_axis_differs_the_union_of_what_touches_a_slice_is_taken():
    # PSR: i = 11 - y, j = z, k = x. Two rows that meet in slice z = 4, one of half a slice in z = 5.
    native = stored_as("PSR")
    boxes = [SliceBox(2, 1, 4, 3, 5), SliceBox(6, 2, 4, 5, 5.5)]
    # x: 2:3 and 6:7. y: 12 - 3 to 12 - 1 = 9:11, and 12 - 5 to 12 - 2 = 7:10.
    assert as_lists(on_grid(boxes, native, RAS)) == {4: [[2.0, 7.0, 7.0, 11.0]], 5: [[6.0, 7.0, 7.0, 10.0]]}


def test_a_grid_of_other_voxels_is_refused():
    other = Geometry(RAS.shape, np.diag([1.1, 1.0, 2.0, 1.0]))
    with pytest.raises(DataError, match="voxels are not those"):
        on_grid([SliceBox(1, 0, 0, 2, 2)], RAS, other)


def test_filling_takes_the_voxels_whose_centre_lies_inside():
    grid = Geometry((5, 4, 2), np.eye(4))
    # i: centres 1.5 and 2.5 lie in [1.5, 3.2); 3.5 does not. j: 0.5 lies in [0, 0.51).
    mask = fill_boxes([SliceBox(1, 1.5, 0, 3.2, 0.51)], grid)
    assert np.argwhere(mask).tolist() == [[1, 0, 1], [2, 0, 1]]
    # The upper edge is not part of the box.
    assert np.argwhere(fill_boxes([SliceBox(0, 0, 0, 1.5, 1)], grid)).tolist() == [[0, 0, 0]]
    # Overlapping boxes are united; what leaves the volume is cut.
    both = fill_boxes([SliceBox(0, 0, 0, 3, 2), SliceBox(0, 2, 1, 9, 9), SliceBox(7, 0, 0, 1, 1)], grid)
    assert both.sum() == 6 + 3 * 3 - 1


def test_a_table_goes_out_and_comes_back_bit_for_bit(tmp_path):
    boxes = {
        "a-1": [SliceBox(3, 0.1, 1 / 3, 5.0, 7.25), SliceBox(4, 0.0, 0.0, 1.0, 1.0)],
        "b": [SliceBox(0, 2.0, 2.0, 240.0, 3.0)],
    }
    path = tmp_path / "new" / "prompts.csv"
    write_box_table(path, boxes)
    assert read_box_table(path) == boxes
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(BOX_COLUMNS) and COLUMNS == BOX_COLUMNS
    assert lines[2] == "a-1,4,0.0,0.0,1.0,1.0"
    assert [p.name for p in path.parent.iterdir()] == ["prompts.csv"], "no temporary file is left"
    write_box_table(path, {})
    assert read_box_table(path) == {}


def test_a_spreadsheets_table_is_read(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("\ufeffnote,case_id,k,i0,j0,i1,j1\r\nx, a ,7, 1,2,3,4\r\n", encoding="utf-8")
    assert read_box_table(path) == {"a": [SliceBox(7, 1.0, 2.0, 3.0, 4.0)]}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("a,1,nan,0,2,2", "not finite"),
        ("a,1,0,0,inf,2", "not finite"),
        ("a,1,3,0,2,2", "not above"),
        ("a,1,0,2,2,2", "not above"),
        ("a,1,0,,2,2", "j0 is ''"),
        ("a,1,0,0,2", "j1 is ''"),
        ("a,1.5,0,0,2,2", "k is '1.5'"),
        ("a,-1,0,0,2,2", "negative"),
        ("a,1,-0.5,0,2,2", "negative"),
        (",1,0,0,2,2", "no case_id"),
        ("a,9,0,0,2,2", r"leaves the volume of shape \(14, 12, 9\)"),
        ("a,1,0,0,15,2", "leaves the volume"),
        ("a,1,0,0,2,12.5", "leaves the volume"),
    ],
)
def test_a_bad_line_is_named_with_its_case(tmp_path, line, fault):
    path = tmp_path / "boxes.csv"
    # A quoted note over two lines: the number must be that of the file's line.
    path.write_text("case_id,k,i0,j0,i1,j1,note\n" + 'a,0,0,0,1,1,"two\nlines"\n' + line + "\n")
    with pytest.raises(ManifestError, match=fault) as caught:
        read_box_table(path, {"a": RAS})
    assert "line 4" in caught.value.message and caught.value.path == path
    assert f"case {line.split(',')[0] or '(none)'}" in caught.value.message


def test_all_faults_are_told_at_once_up_to_a_few(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(HEADER + "a,1,0,0,0,1\n" * 8)
    with pytest.raises(ManifestError) as caught:
        read_box_table(path)
    assert caught.value.message.count("line ") == 5 and "and 3 more" in caught.value.message


def test_boxes_of_cases_without_a_known_grid_are_kept(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(HEADER + "z,500,0,0,900,900\n")
    assert read_box_table(path, {"a": RAS}) == {"z": [SliceBox(500, 0.0, 0.0, 900.0, 900.0)]}


def test_a_table_that_is_none_is_refused(tmp_path):
    path = tmp_path / "boxes.csv"
    with pytest.raises(ManifestError, match="no such file"):
        read_box_table(path)
    path.write_text("case_id,k,i0\n")
    with pytest.raises(ManifestError, match="lacks the column j0, i1, j1"):
        read_box_table(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="not a CSV table"):
        read_box_table(path)
