"""Reference mask to slices, to the model frame, and home: exact, and through the decoder grid nearly so."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from medsam_lora.geometry import Geometry, place
from medsam_lora.io.case import read_case
from medsam_lora.io.manifest import discover
from medsam_lora.labels import MODALITIES
from medsam_lora.prompts.box import boxes_from_mask, to_model
from medsam_lora.prompts.sources import on_grid, reference_boxes
from medsam_lora.records import CaseRecord, CaseVolumes, PreparedSlices
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.resizing import (
    masks_from_model_frame,
    masks_to_model_frame,
    model_scale,
    through_decoder_grid,
)
from medsam_lora.transforms.stages import PreparePlan, prepare_case

THESIS = PreparePlan(crop=CropPlan(size=(138, 202)))
TORCH_BATCH = 8


def phantom(codes: str, tilt_degrees: float = 0.0) -> CaseVolumes:
    """Two ellipsoid lesions in a 60 x 72 x 12 brain, stored in any orientation, also oblique."""
    angle = np.deg2rad(tilt_degrees)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = tilt @ affine
    i, j, k = np.mgrid[:60, :72, :12]
    image = np.where(((i - 30) / 26) ** 2 + ((j - 36) / 32) ** 2 < 1, 100 + i + j + k, 0).astype(np.int16)
    labels = np.zeros(image.shape, np.uint8)
    labels[((i - 22) / 9) ** 2 + ((j - 40) / 12) ** 2 + ((k - 5) / 3) ** 2 < 1] = 2
    labels[((i - 41) / 4) ** 2 + ((j - 25) / 5) ** 2 + ((k - 7) / 3) ** 2 < 1] = 3
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    native_image, native_labels = (nib.orientations.apply_orientation(a, change) for a in (image, labels))
    native = Geometry(native_image.shape, affine @ nib.orientations.inv_ornt_aff(change, image.shape))
    record = CaseRecord("a", "a", "test", {}, "brats2023", "")
    return CaseVolumes(record, MODALITIES, np.stack([native_image] * 4), np.ascontiguousarray(native_labels), native)


def masks_of(slices: PreparedSlices) -> torch.Tensor:
    return torch.from_numpy(np.asarray(slices.label) > 0)[:, None]


def home(masks: torch.Tensor, slices: PreparedSlices) -> np.ndarray:
    volume = np.zeros(slices.crop.shape, bool)
    volume[:, :, list(slices.ks)] = masks[:, 0].numpy().transpose(1, 2, 0)
    return place(volume, slices.crop, slices.native)


def through_frame(masks: torch.Tensor, image_size: int) -> torch.Tensor:
    parts = masks.split(TORCH_BATCH)
    plane = (masks.shape[-2], masks.shape[-1])
    return torch.cat([masks_from_model_frame(masks_to_model_frame(part, image_size), plane) for part in parts])


def through_grid(masks: torch.Tensor, image_size: int) -> torch.Tensor:
    return torch.cat([through_decoder_grid(part, image_size) for part in masks.split(TORCH_BATCH)])


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * int((a & b).sum()) / (int(a.sum()) + int(b.sum()))


ORIENTATIONS = [("RAS", 0.0), ("LPS", 0.0), ("PSR", 0.0), ("LPS", 17.0), ("SRA", -8.0)]


@pytest.mark.parametrize(("codes", "tilt"), ORIENTATIONS)
@pytest.mark.parametrize("image_size", [1024, 128])
def test_a_mask_comes_home_voxel_for_voxel(codes, tilt, image_size):
    case = phantom(codes, tilt)
    slices = prepare_case(case, PreparePlan(crop=CropPlan(size=(51, 66))))
    np.testing.assert_array_equal(home(through_frame(masks_of(slices), image_size), slices), case.label_map > 0)


@pytest.mark.parametrize(("codes", "tilt"), ORIENTATIONS)
def test_boxes_of_the_native_file_are_those_of_the_slices_and_of_the_frame(codes, tilt):
    case = phantom(codes, tilt)
    slices = prepare_case(case, PreparePlan(crop=CropPlan(size=(51, 66))))
    boxes = on_grid(reference_boxes(case.label_map, case.geometry, "WT"), case.geometry, slices.crop)
    assert tuple(boxes) == slices.ks
    scale, _ = model_scale(slices.crop.shape[:2], 1024)
    for k, mask in zip(slices.ks, masks_of(slices)[:, 0], strict=True):
        np.testing.assert_array_equal(boxes[k], boxes_from_mask(mask.numpy()))
        ((x0, y0, x1, y1),) = to_model(boxes[k], scale)
        framed = masks_to_model_frame(mask[None, None], 1024)[0, 0].numpy()
        rows, columns = np.flatnonzero(framed.any(axis=1)), np.flatnonzero(framed.any(axis=0))
        # A frame pixel belongs to the voxel under its centre, so edges agree to half a pixel, and the short side
        # is stretched by up to half a pixel more.
        np.testing.assert_allclose((y0, y1), (rows[0], rows[-1] + 1), atol=1.0)
        np.testing.assert_allclose((x0, x1), (columns[0], columns[-1] + 1), atol=0.5 + 1e-3)


def test_smooth_lesions_survive_the_decoder_grid_and_a_coarser_one_costs_more():
    case = phantom("LPS")
    slices = prepare_case(case, PreparePlan(crop=CropPlan(size=(51, 66))))
    scores = [dice(home(through_grid(masks_of(slices), size), slices), case.label_map > 0) for size in (512, 128, 64)]
    assert scores[0] == 1.0 and scores[0] > scores[1] > scores[2] > 0.8


@pytest.fixture(scope="module")
def real_cases(brats_dir) -> list[tuple[CaseVolumes, PreparedSlices]]:
    # One modality is enough: it is the reference that travels.
    records = [replace(record, split="test") for record in discover(brats_dir)]
    cases = [read_case(record, brats_dir, ["t2f"]) for record in records]
    return [(case, prepare_case(case, THESIS)) for case in cases]


@pytest.mark.real_data
def test_real_references_come_home_voxel_for_voxel(real_cases):
    assert real_cases
    for case, slices in real_cases:
        assert slices.report["tumour_voxels_lost"] == 0
        back = home(through_frame(masks_of(slices), 1024), slices)
        np.testing.assert_array_equal(back, case.label_map > 0, err_msg=case.record.case_id)


@pytest.mark.real_data
def test_real_references_through_the_decoder_grid_keep_a_dice_of_0_999(real_cases):
    scores = {
        case.record.case_id: dice(home(through_grid(masks_of(slices), 1024), slices), case.label_map > 0)
        for case, slices in real_cases
    }
    assert scores and min(scores.values()) >= 0.999, scores


@pytest.mark.real_data
def test_real_boxes_are_the_same_from_the_file_and_from_the_slices(real_cases):
    for case, slices in real_cases[:3]:
        for kind in ("union", "per_component"):
            native = reference_boxes(case.label_map, case.geometry, "WT", kind)
            boxes = on_grid(native, case.geometry, slices.crop)
            assert tuple(boxes) == slices.ks
            for n, k in enumerate(slices.ks):
                expected = boxes_from_mask(slices.label[n] > 0, kind)
                assert sorted(map(tuple, boxes[k].tolist())) == sorted(map(tuple, expected.tolist()))
