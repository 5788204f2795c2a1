"""Small BraTS-like cases on disk for tests: real NIfTI files, every voxel known."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (6, 5, 4)
# The affine of BraTS (L-P-S), for the small shape: index 0 is at the left and at the back.
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 4], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
SUFFIXES_2023 = {"t1n": "-t1n", "t1c": "-t1c", "t2f": "-t2f", "t2w": "-t2w", "seg": "-seg"}
SUFFIXES_2018 = {"t1n": "_t1", "t1c": "_t1ce", "t2f": "_flair", "t2w": "_t2", "seg": "_seg"}


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write an array with equal qform and sform."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def voxels(case_id: str, key: str, shape: tuple[int, int, int] = SHAPE, et: int = 3) -> np.ndarray:
    """The voxels of a file: different in every case and modality; labels 0, 1, 2 and `et` in a reference."""
    if key == "seg":
        label_map = np.zeros(shape, np.int16)
        label_map[1:4, 1:4, 1:3] = 2
        label_map[2, 1:3, 1] = 1
        label_map[2, 2, 2] = et
        return label_map
    seed = list(f"{case_id} {key}".encode())
    return np.random.default_rng(seed).integers(1, 900, shape).astype(np.int16)


def write_case(
    root: Path, case_id: str, *, suffixes: dict[str, str] | None = None, nested: bool = True, ending: str = ".nii.gz"
) -> dict[str, Path]:
    """Write a whole case; the references of two cases differ in one voxel, as copies are a fault."""
    suffixes = SUFFIXES_2023 if suffixes is None else suffixes
    folder = root / case_id if nested else root
    paths = {}
    for key, suffix in suffixes.items():
        array = voxels(case_id, key, et=3 if suffixes == SUFFIXES_2023 else 4)
        if key == "seg":
            spare = np.flatnonzero(array == 0)
            array.flat[spare[sum(case_id.encode()) % spare.size]] = 2
        paths[key] = save(folder / f"{case_id}{suffix}{ending}", array)
    return paths
