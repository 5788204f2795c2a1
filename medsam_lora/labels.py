"""Modalities, label conventions and tumour regions: said here and nowhere else.

The canonical label map of the package is that of BraTS 2023: 1 NETC (necrotic and non-enhancing tumour core),
2 SNFH (surrounding non-enhancing FLAIR hyperintensity, "oedema"), 3 ET (enhancing tumour). Maps of other
conventions are converted once, at reading, by `to_canonical`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from medsam_lora.errors import DataError

MODALITIES: Final = ("t1n", "t1c", "t2f", "t2w")
"""The four modalities in channel order, everywhere in the package."""

MODALITY_ALIASES: Final[Mapping[str, str]] = {
    "t1n": "t1n",
    "t1": "t1n",
    "t1c": "t1c",
    "t1ce": "t1c",
    "t1gd": "t1c",
    "t2f": "t2f",
    "flair": "t2f",
    "t2w": "t2w",
    "t2": "t2w",
}
"""File-name suffixes (lower case) of BraTS 2017-2023 and MSD, and the modality each means."""

NETC: Final = 1
SNFH: Final = 2
ET: Final = 3

LABEL_NAMES: Final[Mapping[int, str]] = {
    NETC: "NETC (necrotic / non-enhancing core)",
    SNFH: "SNFH (oedema / infiltration)",
    ET: "ET (enhancing tumour)",
}

LABELS: Final[Mapping[str, int]] = {"NETC": NETC, "SNFH": SNFH, "ET": ET}
"""Short names of the canonical labels, as a run record's ``labels`` block uses them."""

LABEL_COLOURS: Final[Mapping[int, tuple[float, float, float]]] = {
    NETC: (0.90, 0.20, 0.20),
    SNFH: (0.20, 0.80, 0.35),
    ET: (1.00, 0.85, 0.10),
}
"""Display colours, red-green-blue in [0, 1]: each label has that of the region it is the outermost part of."""

CONVENTIONS: Final[Mapping[str, Mapping[int, int]]] = {
    "brats2023": {1: NETC, 2: SNFH, 3: ET},
    "brats2018": {1: NETC, 2: SNFH, 4: ET},
    "msd": {1: SNFH, 2: NETC, 3: ET},
    # A binary reference says only where tumour is; SNFH belongs to WT alone, so no claim on TC or ET is made.
    "binary": {1: SNFH},
}
"""For every label convention, its label values and the canonical label each means (0 is always background)."""

REGIONS: Final[Mapping[str, tuple[int, ...]]] = {
    "WT": (NETC, SNFH, ET),
    "TC": (NETC, ET),
    "ET": (ET,),
}
"""The BraTS evaluation regions as sets of canonical labels, from the outermost inwards."""

REGION_NAMES: Final[Mapping[str, str]] = {"WT": "Whole tumour", "TC": "Tumour core", "ET": "Enhancing tumour"}

REGION_COLOURS: Final[Mapping[str, tuple[float, float, float]]] = {
    "WT": (0.20, 0.80, 0.35),
    "TC": (0.90, 0.20, 0.20),
    "ET": (1.00, 0.85, 0.10),
}
"""Display colours, red-green-blue in [0, 1]."""


def regions_of(convention: str) -> tuple[str, ...]:
    """Regions that a reference of `convention` can be scored on.

    Examples
    --------
    >>> regions_of("brats2018"), regions_of("binary")
    (('WT', 'TC', 'ET'), ('WT',))
    """
    known = set(CONVENTIONS[convention].values())
    return tuple(name for name, labels in REGIONS.items() if name == "WT" or set(labels) <= known)


def unexpected_labels(label_map: np.ndarray, convention: str) -> dict[int, int]:
    """Label values that `convention` does not define, with the voxel count of each.

    Parameters
    ----------
    label_map : ndarray of integer, any shape
    convention : str
        A key of `CONVENTIONS`.
    """
    # Only what is marked is looked at, and only what is strange is sorted, which in nearly every map is nothing.
    return _unexpected(label_map[label_map != 0], convention)


def _unexpected(marked: np.ndarray, convention: str) -> dict[int, int]:
    strange = np.ones(marked.shape, bool)
    for value in CONVENTIONS[convention]:
        strange &= marked != value
    values, counts = np.unique(marked[strange], return_counts=True)
    return {int(v): int(c) for v, c in zip(values, counts, strict=True)}


def to_canonical(label_map: np.ndarray, convention: str, *, contiguous: bool = True) -> np.ndarray:
    """Convert a label map to the canonical labels.

    Parameters
    ----------
    label_map : ndarray of integer, any shape
    convention : str
        A key of `CONVENTIONS`.
    contiguous : bool
        Give a C-contiguous array; else it lies in memory as `label_map` does, which is faster for that of a file.

    Returns
    -------
    ndarray of uint8, same shape

    Raises
    ------
    DataError
        Where the map holds a value that the convention does not define.

    Examples
    --------
    >>> to_canonical(np.array([0, 1, 2, 4]), "brats2018").tolist()
    [0, 1, 2, 3]
    """
    if convention not in CONVENTIONS:
        raise DataError(f"unknown label convention {convention!r}", remedy=f"Use one of {', '.join(CONVENTIONS)}.")
    # In the order of the file: masks and arrays of unlike order are slow to combine.
    canonical = np.zeros_like(label_map, np.uint8)
    there, result = _in_order(label_map), _in_order(canonical)
    mask = there != 0
    marked = there[mask]
    unexpected = _unexpected(marked, convention)
    if unexpected:
        found = ", ".join(f"{value} ({count} voxels)" for value, count in unexpected.items())
        raise DataError(
            f"label values {found} are not part of the convention {convention!r}",
            remedy=_convention_hint(unexpected, convention, has_3=bool((marked == 3).any())),
            code="unexpected_label",
        )
    labels = np.zeros(marked.shape, np.uint8)
    for value, label in CONVENTIONS[convention].items():
        labels[marked == value] = label
    result[mask] = labels
    return np.ascontiguousarray(canonical) if contiguous else canonical


def _in_order(array: np.ndarray) -> np.ndarray:
    """A view whose axes run as its memory does, slowest first."""
    return array.T if array.flags.f_contiguous else array


def _convention_hint(unexpected: Mapping[int, int], convention: str, *, has_3: bool) -> str:
    if set(unexpected) == {4} and convention == "brats2023":
        if has_3:
            # BraTS 2024 (post-treatment glioma) added a fourth label; calling that map brats2018 would lose its 3.
            return "Labels 3 and 4 in one map are those of BraTS 2024, where 4 is the resection cavity: set 4 to 0."
        return (
            "Label 4 is enhancing tumour in the convention of BraTS 2018-2021: "
            "set label_convention to brats2018 in the manifest."
        )
    if set(unexpected) == {3} and convention == "brats2018":
        return "Label 3 is enhancing tumour in BraTS 2023: set label_convention to brats2023 in the manifest."
    return "Correct the reference, or set label_convention in the manifest."


def meaning_of(name: str) -> frozenset[int]:
    """The canonical labels that the name of a label or region stands for.

    Parameters
    ----------
    name : str
        A key of `LABELS` or `REGIONS`.

    Examples
    --------
    >>> sorted(meaning_of("SNFH")), sorted(meaning_of("TC"))
    ([2], [1, 3])
    """
    return frozenset({LABELS[name]} if name in LABELS else REGIONS[name])


def nested(masks: np.ndarray) -> np.ndarray:
    """Cut every region to the one it lies in, so that ET is within TC and TC within WT.

    The outer region decides: a box prompt is the whole tumour's, so that WT is the mask to be trusted most.

    Parameters
    ----------
    masks : ndarray of bool, shape (R, ...)
        One mask per region, in the order of `REGIONS`.

    Returns
    -------
    ndarray of bool, same shape

    Examples
    --------
    >>> nested(np.array([[True, True, False], [True, False, True], [True, True, True]])).astype(int).tolist()
    [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    """
    return np.logical_and.accumulate(masks, axis=0)


def label_map_of(masks: np.ndarray, regions: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """One label map from the masks of regions, and what its values mean.

    All three regions become the canonical labels, which other programs of BraTS read: 3 is ET, 1 the rest of TC, 2 the
    rest of WT. A single region becomes the value 1 and is called by its own name.

    Parameters
    ----------
    masks : ndarray of bool, shape (R, X, Y, Z)
        Made `nested` first.
    regions : sequence of str
        All of `REGIONS`, or one of them.

    Returns
    -------
    label_map : ndarray of uint8, shape (X, Y, Z)
    meanings : dict of int to str
        Voxel value to a key of `REGIONS` or `LABELS`.

    Raises
    ------
    ValueError
        For another choice of regions: a map without WT, say, could not tell TC's rim from background.

    Examples
    --------
    >>> masks = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool).reshape(3, 4, 1, 1)
    >>> label_map, meanings = label_map_of(masks, ["WT", "TC", "ET"])
    >>> label_map.ravel().tolist(), meanings
    ([3, 1, 2, 0], {1: 'NETC', 2: 'SNFH', 3: 'ET'})
    """
    if len(regions) == 1:
        return masks[0].astype(np.uint8), {1: regions[0]}
    if tuple(regions) != tuple(REGIONS):
        raise ValueError(f"regions {list(regions)}: a label map holds one region or {', '.join(REGIONS)}")
    label_map = np.zeros(masks.shape[1:], np.uint8)
    for mask, value in zip(nested(masks), (SNFH, NETC, ET), strict=True):
        label_map[mask] = value
    return label_map, {value: name for name, value in LABELS.items()}


def region_mask(label_map: np.ndarray, region: str) -> np.ndarray:
    """Mask of a region.

    Parameters
    ----------
    label_map : ndarray of integer, any shape
        Canonical labels.
    region : str
        A key of `REGIONS`.

    Returns
    -------
    ndarray of bool, same shape

    Examples
    --------
    >>> region_mask(np.array([0, 1, 2, 3]), "TC").tolist()
    [False, True, False, True]
    """
    # Comparisons beat np.isin by an order of magnitude on whole volumes.
    mask = np.zeros_like(label_map, bool)
    for label in REGIONS[region]:
        mask |= label_map == label
    return mask
