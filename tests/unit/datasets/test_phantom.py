"""The phantom as a user has it: like BraTS to look at and as hard by its floor, one patient on any grid."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label

from medsam_lora.datasets.implicit import rotation
from medsam_lora.datasets.phantom import PhantomCase, case_identity, case_name, default_affine, make_case
from medsam_lora.datasets.phantom_lattice import filled_box_dice
from medsam_lora.geometry import Geometry, place
from medsam_lora.labels import ET, MODALITIES, NETC, SNFH, region_mask

SMALL = (48, 56, 32)


def volume_ml(case: PhantomCase, mask: np.ndarray) -> float:
    return float(mask.sum()) * case.geometry.voxel_volume_ml


def brain(case: PhantomCase) -> np.ndarray:
    return case.images[0] > 0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def middle_mm(case: PhantomCase, mask: np.ndarray) -> np.ndarray:
    """World centroid of a mask relative to the middle of the grid."""
    middle = case.geometry.world((np.array(case.geometry.shape) - 1) / 2)
    return case.geometry.world(np.argwhere(mask).mean(axis=0)) - middle


def test_a_dozen_cases_are_as_hard_as_real_ones(dozen: list[PhantomCase]) -> None:
    floors = [filled_box_dice(case.label_map > 0) for case in dozen]
    assert min(floors) >= 0.57, floors
    assert max(floors) <= 0.82, floors
    assert 0.62 < np.mean(floors) < 0.76
    assert np.std(floors) > 0.02


def test_a_dozen_tumours_of_all_sizes_and_kinds(dozen: list[PhantomCase]) -> None:
    volumes = sorted(volume_ml(case, case.label_map > 0) for case in dozen)
    assert 1.5 < volumes[0] < 12, volumes
    assert 70 < volumes[-1] < 165, volumes
    complete = sum(set(np.unique(case.label_map)) == {0, NETC, SNFH, ET} for case in dozen)
    assert complete >= 10
    # Some cases have lesions apart from each other, each of more than a millilitre.
    several = 0
    for case in dozen:
        parts, _ = label(region_mask(case.label_map, "TC"))
        sizes = np.bincount(parts.ravel())[1:] * case.geometry.voxel_volume_ml
        several += int((sizes > 1).sum() > 1)
    assert 1 <= several <= 8


def test_brain_and_background(dozen: list[PhantomCase]) -> None:
    for case in dozen:
        inside = brain(case)
        assert case.images.dtype == np.int16
        assert case.images.shape == (len(MODALITIES), *case.geometry.shape)
        for image in case.images:
            assert np.array_equal(image != 0, inside)
            assert image.min() == 0
        assert 1100 < volume_ml(case, inside) < 1900
        assert label(inside)[1] == 1
        # Tumour only in the brain, so that a brain crop loses none.
        assert case.label_map.dtype == np.uint8
        assert not (case.label_map > 0)[~inside].any()


def test_tumour_shows_in_the_right_modalities(dozen: list[PhantomCase]) -> None:
    shown = {"oedema on t2f": 0, "rim on t1c": 0, "rim brighter on t1c than on t1n": 0, "oedema on t2w": 0}
    for case in dozen:
        rest = brain(case) & (case.label_map == 0)
        relative = {name: image / np.median(image[rest]) for name, image in zip(MODALITIES, case.images, strict=True)}
        at = {name: {k: np.median(image[case.label_map == k]) for k in (SNFH, ET)} for name, image in relative.items()}
        shown["oedema on t2f"] += at["t2f"][SNFH] > 1.2
        shown["oedema on t2w"] += at["t2w"][SNFH] > 0.95
        shown["rim on t1c"] += at["t1c"][ET] > 1.25
        shown["rim brighter on t1c than on t1n"] += at["t1c"][ET] > 1.2 * at["t1n"][ET]
    assert min(shown.values()) >= 10, shown


def test_fluid_is_dark_on_t2f_and_bright_on_t2w(dozen: list[PhantomCase]) -> None:
    for case in dozen[:4]:
        t1n, _, t2f, t2w = (image.astype(float) for image in case.images)
        rest = brain(case) & (case.label_map == 0)
        fluid = rest & (t2w > np.percentile(t2w[rest], 95))
        for image in (t1n, t2f):
            assert np.median(image[fluid]) < 0.7 * np.median(image[rest])


def test_equal_seeds_give_equal_cases_and_no_others_do() -> None:
    first, again = make_case(3, 1, SMALL), make_case(3, 1, SMALL)
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.label_map, again.label_map)
    for other in (make_case(4, 1, SMALL), make_case(3, 0, SMALL)):
        assert dice(first.label_map > 0, other.label_map > 0) < 0.8
        assert not np.array_equal(brain(first), brain(other))


def test_global_random_state_is_untouched() -> None:
    np.random.seed(7)  # noqa: NPY002 - the state that must survive
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    make_case(0, 0, SMALL)
    assert np.array_equal(np.random.random(3), expected)  # noqa: NPY002


def test_case_ids_and_time_points() -> None:
    names = [case_name(index) for index in range(60)]
    assert len(set(names)) == 60
    assert names[:4] == ["BraTS-PHT-00000-000", "BraTS-PHT-00001-000", "BraTS-PHT-00001-001", "BraTS-PHT-00002-000"]
    patients = [case_identity(index)[0] for index in range(60)]
    assert sorted(set(patients)) == list(range(50))
    assert sum(moment for _, moment in map(case_identity, range(60))) == 10


def test_second_time_point_is_the_same_head_with_a_changed_tumour(dozen: list[PhantomCase]) -> None:
    first, second, other = dozen[1], dozen[2], dozen[3]
    assert first.case_id[:-4] == second.case_id[:-4]
    assert dice(brain(first), brain(second)) > 0.95 > dice(brain(first), brain(other))
    early, late = first.label_map > 0, second.label_map > 0
    assert dice(early, late) > 0.3
    ratio = volume_ml(second, late) / volume_ml(first, early)
    assert ratio > 1.15 or ratio < 0.87
    # Another day, another scanner: the voxels are not those of the first scan.
    assert not np.array_equal(first.images, second.images)


def test_default_affine_is_that_of_brats_and_holds_a_head() -> None:
    assert np.array_equal(default_affine((240, 240, 155)), [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    coarse = Geometry((96, 112, 64), default_affine((96, 112, 64)))
    assert coarse.axis_codes == ("L", "P", "S")
    assert coarse.spacing_mm[0] == coarse.spacing_mm[1]
    extent = np.array(coarse.spacing_mm) * coarse.shape
    assert (extent >= (149.9, 187.9, 153.9)).all()


def test_the_same_patient_on_a_grid_of_other_axes() -> None:
    lps = make_case(0, 0, SMALL)
    flip = np.eye(4)
    flip[0, 0] = flip[1, 1] = -1
    flip[:2, 3] = np.array(SMALL[:2]) - 1
    ras = make_case(0, 0, SMALL, lps.geometry.affine @ flip)
    assert ras.geometry.axis_codes == ("R", "A", "S")
    home = place(ras.label_map, ras.geometry, lps.geometry)
    # Only the last bit of a coordinate may decide differently.
    assert dice(home > 0, lps.label_map > 0) > 0.999
    # Array axes in another order: S, L, P.
    order = np.zeros((4, 4))
    order[2, 0] = order[0, 1] = order[1, 2] = order[3, 3] = 1
    slp = make_case(0, 0, (SMALL[2], SMALL[0], SMALL[1]), lps.geometry.affine @ order)
    assert slp.geometry.axis_codes == ("S", "L", "P")
    assert dice(place(slp.label_map, slp.geometry, lps.geometry) > 0, lps.label_map > 0) > 0.999


def test_the_same_patient_on_an_oblique_and_a_finer_grid() -> None:
    demo = make_case(0, 3)
    tumour = demo.label_map > 0
    oblique = np.eye(4)
    oblique[:3, :3] = rotation(np.array([0.2, -0.1, 0.3])) @ np.diag([-2.0, -2.0, 2.5])
    oblique[:3, 3] = (31.0, -250.0, 1000.0)
    for shape, affine in (((100, 116, 80), oblique), ((130, 150, 84), None)):
        other = make_case(0, 3, shape, affine)
        mask = other.label_map > 0
        assert volume_ml(other, mask) == pytest.approx(volume_ml(demo, tumour), rel=0.05)
        assert np.abs(middle_mm(other, mask) - middle_mm(demo, tumour)).max() < 1.5
        assert volume_ml(other, brain(other)) == pytest.approx(volume_ml(demo, brain(demo)), rel=0.03)
        assert 0.55 < filled_box_dice(mask) < 0.85
        assert not mask[~brain(other)].any()


def test_a_head_is_shrunk_to_a_small_field_of_view() -> None:
    case = make_case(0, 0, (32, 32, 32), np.eye(4))
    inside = brain(case)
    # All of it, not a part: the brain ends before the grid does along every axis.
    for axis in range(3):
        found = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        assert found[0] >= 0 and found[-1] <= 31
    assert 0.2 < inside.mean() < 0.5
    assert not inside[0, 0].any()
    assert (case.label_map > 0).sum() > 50


def test_a_head_without_lesions_is_the_same_head() -> None:
    ill, well = make_case(0, 0, SMALL), make_case(0, 0, SMALL, lesions=False)
    assert not well.label_map.any()
    assert dice(brain(ill), brain(well)) > 0.98
    both = brain(ill) & brain(well)
    tumour = ill.label_map > 0
    ratio = ill.images / np.maximum(well.images, 1)
    t2f = MODALITIES.index("t2f")
    assert np.median(ratio[t2f][tumour]) > 1.3
    # The other hemisphere is nearly untouched.
    side = int(np.sign(np.argwhere(tumour)[:, 0].mean() - SMALL[0] / 2))
    far = both & (np.sign(np.indices(SMALL)[0] - SMALL[0] / 2 + 8 * side) == -side)
    assert np.median(ratio[t2f][far]) == pytest.approx(1.0, abs=0.02)
