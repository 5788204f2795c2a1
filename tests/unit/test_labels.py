"""Label conventions and regions, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora import labels
from medsam_lora.errors import DataError


@pytest.mark.parametrize(
    ("convention", "given", "canonical"),
    [
        # BraTS 2023: 1 NETC, 2 SNFH, 3 ET, which is the package's own.
        ("brats2023", [0, 1, 2, 3], [0, 1, 2, 3]),
        # BraTS 2018-2021: enhancing tumour is 4.
        ("brats2018", [0, 1, 2, 4], [0, 1, 2, 3]),
        # MSD Task01: 1 oedema, 2 non-enhancing, 3 enhancing.
        ("msd", [0, 1, 2, 3], [0, 2, 1, 3]),
        ("binary", [0, 1], [0, 2]),
    ],
)
def test_every_convention_becomes_the_canonical_labels(convention, given, canonical):
    converted = labels.to_canonical(np.array(given, np.int16), convention)
    assert converted.tolist() == canonical
    assert converted.dtype == np.uint8


def test_the_input_is_left_alone():
    given = np.array([0, 4])
    labels.to_canonical(given, "brats2018")
    assert given.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("values", "convention", "hint"),
    [
        ([0, 2, 4, 4], "brats2023", "set label_convention to brats2018"),
        ([0, 2, 3], "brats2018", "set label_convention to brats2023"),
        ([0, 255], "brats2023", "Correct the reference"),
        ([-1, 1], "binary", "Correct the reference"),
        ([4, 5], "brats2023", "Correct the reference"),
    ],
)
def test_a_strange_label_is_refused_with_its_count_and_the_likely_convention(values, convention, hint):
    with pytest.raises(DataError) as caught:
        labels.to_canonical(np.array(values), convention)
    assert hint in caught.value.remedy
    assert caught.value.code == "unexpected_label"
    strange, count = list(labels.unexpected_labels(np.array(values), convention).items())[-1]
    assert f"{strange} ({count} voxels)" in str(caught.value)


def test_an_unknown_convention_names_the_known_ones():
    with pytest.raises(DataError, match="brats2023, brats2018, msd, binary"):
        labels.to_canonical(np.zeros(2, int), "brats2020")


@pytest.mark.parametrize(
    ("region", "mask"),
    [("WT", [False, True, True, True]), ("TC", [False, True, False, True]), ("ET", [False, False, False, True])],
)
def test_regions_are_the_sets_of_the_challenge(region, mask):
    found = labels.region_mask(np.array([0, 1, 2, 3], np.uint8), region)
    assert found.dtype == bool
    assert found.tolist() == mask


def test_regions_lie_inside_each_other_on_any_map():
    label_map = np.random.default_rng(0).integers(0, 4, (6, 5, 4)).astype(np.uint8)
    whole, core, enhancing = (labels.region_mask(label_map, name) for name in labels.REGIONS)
    assert whole[core].all() and core[enhancing].all()
    assert whole.sum() > core.sum() > enhancing.sum() > 0


@pytest.mark.parametrize(
    ("convention", "regions"),
    [
        ("brats2023", ("WT", "TC", "ET")),
        ("brats2018", ("WT", "TC", "ET")),
        ("msd", ("WT", "TC", "ET")),
        ("binary", ("WT",)),
    ],
)
def test_a_reference_is_scored_only_on_what_it_says(convention, regions):
    assert labels.regions_of(convention) == regions


def test_every_alias_means_a_modality_and_every_modality_is_its_own_alias():
    assert set(labels.MODALITY_ALIASES.values()) == set(labels.MODALITIES)
    assert all(labels.MODALITY_ALIASES[name] == name for name in labels.MODALITIES)
    assert (labels.MODALITY_ALIASES["t1ce"], labels.MODALITY_ALIASES["flair"]) == ("t1c", "t2f")


def test_the_tables_of_regions_and_labels_cover_each_other():
    assert set(labels.REGION_NAMES) == set(labels.REGION_COLOURS) == set(labels.REGIONS)
    assert set(labels.REGIONS["WT"]) == set(labels.LABEL_NAMES)
    assert all(0 <= part <= 1 for colour in labels.REGION_COLOURS.values() for part in colour)


def test_a_label_map_of_regions_gives_the_nested_regions_back():
    masks = np.random.default_rng(3).random((3, 6, 5, 4)) < 0.6
    label_map, meanings = labels.label_map_of(masks, list(labels.REGIONS))
    assert meanings == {1: "NETC", 2: "SNFH", 3: "ET"} and label_map.dtype == np.uint8
    for region, mask in zip(labels.REGIONS, labels.nested(masks), strict=True):
        assert np.array_equal(labels.region_mask(label_map, region), mask)
    # The outermost region is never changed by those within it.
    assert np.array_equal(label_map > 0, masks[0])


def test_a_label_map_holds_one_region_or_all():
    masks = np.ones((2, 2, 2, 2), bool)
    with pytest.raises(ValueError, match="one region or WT, TC, ET"):
        labels.label_map_of(masks, ["WT", "TC"])
    label_map, meanings = labels.label_map_of(masks[:1], ["WT"])
    assert label_map.all() and meanings == {1: "WT"}
