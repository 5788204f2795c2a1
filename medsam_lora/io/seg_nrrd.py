"""Segmentations for 3D Slicer: `.seg.nrrd` files with named, coloured segments.

The format is NRRD [1]_ with the header fields that Slicer's segmentation storage node reads [2]_. The writer is our
own because the libraries' files carry a time stamp: here, equal segmentations give equal bytes.

The world of the file is LPS+ mm; this module is one of the few places where that frame appears.

References
----------
.. [1] G. Kindlmann, "Definition of NRRD File Format", teem.sourceforge.net/nrrd/format.html.
.. [2] 3D Slicer, vtkMRMLSegmentationStorageNode, and the developer guide's page on segmentations.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsam_lora import labels
from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.io.files import write_bytes_atomically

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

# All codes below are in Slicer's "DICOM master list" of segmentation categories and types; it has no entry for an
# enhancing lesion, so the name says what the code cannot.
_CONTEXT = "Segmentation category and type - DICOM master list"
_CATEGORY = "SCT^49755003^Morphologically Altered Structure"
_ANATOMY = "Anatomic codes - DICOM master list~SCT^12738006^Brain~^^"
_TERMINOLOGY: Mapping[str, str] = {
    "WT": "SCT^108369006^Neoplasm",
    "TC": "SCT^108369006^Neoplasm",
    "NETC": "SCT^6574001^Necrosis",
    "SNFH": "SCT^79654002^Edema",
    "ET": "SCT^86049000^Neoplasm, Primary",
}


@dataclass(frozen=True)
class Segment:
    """One segment of a label map.

    Parameters
    ----------
    label : int
        Its voxel value, 1 to 255.
    name : str
        As Slicer lists it.
    colour : tuple of float
        Red, green, blue in [0, 1].
    terminology : str
        Type code ``scheme^code^meaning`` of a morphologically altered structure.

    Raises
    ------
    ValueError
        Where the name or code holds a character that separates fields in the header.
    """

    label: int
    name: str
    colour: tuple[float, float, float]
    terminology: str

    def __post_init__(self) -> None:
        if not 1 <= self.label <= 255:
            raise ValueError(f"segment {self.name!r} has the label {self.label}; 1 to 255 are possible")
        if not self.name or re.search(r"[|~^&\\\r\n]", self.name):
            raise ValueError(f"segment name {self.name!r} is empty or holds one of | ~ ^ & \\ or a line break")
        if not re.fullmatch(r"[^|~^&\\\r\n]+\^[^|~^&\\\r\n]+\^[^|~^&\\\r\n]+", self.terminology):
            raise ValueError(f"terminology {self.terminology!r} is not of the form scheme^code^meaning")
        if len(self.colour) != 3 or not all(0 <= c <= 1 for c in self.colour):
            raise ValueError(f"colour {self.colour} is not red, green, blue in [0, 1]")


def segments_for(meanings: Mapping[int, str]) -> list[Segment]:
    """Segments for the labels of a prediction.

    Parameters
    ----------
    meanings : mapping of int to str
        Voxel value to a key of `labels.REGIONS` or `labels.LABELS`, as in a run record's ``labels``.

    Examples
    --------
    >>> segments_for({1: "WT"})[0].name
    'Whole tumour'
    >>> [s.name.split()[0] for s in segments_for({1: "NETC", 2: "SNFH", 3: "ET"})]
    ['NETC', 'SNFH', 'ET']
    """
    segments = []
    for value, meaning in sorted(meanings.items()):
        if meaning in labels.LABELS:
            canonical = labels.LABELS[meaning]
            name, colour = labels.LABEL_NAMES[canonical], labels.LABEL_COLOURS[canonical]
        elif meaning in labels.REGIONS:
            name, colour = labels.REGION_NAMES[meaning], labels.REGION_COLOURS[meaning]
        else:
            raise ValueError(f"{meaning!r} is neither a region nor a label")
        segments.append(Segment(int(value), name, colour, _TERMINOLOGY[meaning]))
    return segments


def write_seg_nrrd(path: Path, label_map: np.ndarray, geometry: Geometry, segments: Sequence[Segment]) -> None:
    """Write a segmentation, atomically and byte-reproducibly.

    Parameters
    ----------
    path : Path
        Ending in ``.seg.nrrd``, by which Slicer knows a segmentation.
    label_map : ndarray of integer or bool, shape geometry.shape
        Native grid.
    geometry : Geometry
    segments : sequence of Segment
        One for every label of the map; a segment without voxels is kept, so that it can be drawn.

    Raises
    ------
    DataError
        Where the affine is sheared or the grid has a single voxel, which Slicer cannot open.
    ValueError
        Where a label has no segment, two segments share a label, or the shapes differ.
    """
    if not path.name.endswith(".seg.nrrd"):
        raise ValueError(f"{path.name} must end in .seg.nrrd")
    if not geometry.is_orthogonal:
        raise DataError(
            "the affine is sheared; ITK and 3D Slicer cannot open it",
            path=path,
            remedy="Resample the image onto an orthogonal grid.",
            code="sheared_affine",
        )
    if geometry.shape == (1, 1, 1):
        raise DataError("3D Slicer takes an image of a single voxel for none", path=path, code="single_voxel")
    voxels = _checked_voxels(label_map, geometry, segments)
    header = "\n".join(_header_lines(voxels, geometry, segments)) + "\n\n"
    write_bytes_atomically(path, header.encode("utf-8") + _compressed(voxels.tobytes(order="F")))


def read_seg_nrrd(path: Path) -> tuple[np.ndarray, Geometry, list[Segment]]:
    """Read a file that `write_seg_nrrd` wrote.

    Returns
    -------
    label_map : ndarray of uint8, shape geometry.shape
    geometry : Geometry
    segments : list of Segment

    Raises
    ------
    DataError
        Where the file is damaged or uses what our writer does not (layers, other types, other spaces).
    """
    if not path.is_file():
        raise DataError("no such file", path=path, remedy="Check the path.", code="missing_file")
    head, _, body = path.read_bytes().partition(b"\n\n")
    try:
        magic, *lines = head.decode("utf-8").split("\n")
        pairs = [re.split(r":=|: ", line, maxsplit=1) for line in lines if not line.startswith("#")]
        fields = {pair[0]: pair[1] for pair in pairs}
        if not magic.startswith("NRRD000") or any(fields[key] != value for key, value in _FIXED.items()):
            raise ValueError("not a header of this writer")
        geometry = _read_geometry(fields)
        with gzip.GzipFile(fileobj=io.BytesIO(body)) as stream:
            # One byte more than there should be: it reaches the check sum, and a bomb does not inflate.
            raw = stream.read(int(np.prod(geometry.shape)) + 1)
        label_map = np.frombuffer(raw, np.uint8).reshape(geometry.shape, order="F")
        segments: list[Segment] = []
        while f"Segment{len(segments)}_ID" in fields:
            segments.append(_read_segment(fields, f"Segment{len(segments)}_"))
    except (UnicodeDecodeError, ValueError, KeyError, IndexError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"not a segmentation written by this program ({error})",
            path=path,
            remedy="Predict the case again.",
            code="unreadable",
        ) from error
    return label_map, geometry, segments


_FIXED: Mapping[str, str] = {
    "type": "unsigned char",
    "dimension": "3",
    "space": "left-posterior-superior",
    "kinds": "domain domain domain",
    "encoding": "gzip",
}


def _checked_voxels(label_map: np.ndarray, geometry: Geometry, segments: Sequence[Segment]) -> np.ndarray:
    if label_map.shape != geometry.shape:
        raise ValueError(f"a label map of shape {label_map.shape} on a grid of shape {geometry.shape}")
    if label_map.dtype.kind not in "biu":
        raise ValueError(f"a label map holds integers, not {label_map.dtype}")
    known = [segment.label for segment in segments]
    if len(set(known)) != len(known):
        raise ValueError(f"two segments share a label: {known}")
    present = [int(value) for value in np.unique(label_map) if value != 0]
    nameless = [value for value in present if value not in known]
    if nameless:
        # Slicer would not show these voxels at all.
        raise ValueError(f"the labels {nameless} have no segment")
    return label_map.astype(np.uint8)


def _header_lines(voxels: np.ndarray, geometry: Geometry, segments: Sequence[Segment]) -> list[str]:
    lps = _RAS_TO_LPS @ geometry.affine
    x, y, z = geometry.shape
    whole = f"0;{x - 1};0;{y - 1};0;{z - 1};"
    ras = "".join(f"{_number(value)};" for value in geometry.affine.ravel())
    lines = [
        "NRRD0004",
        f"type: {_FIXED['type']}",
        f"dimension: {_FIXED['dimension']}",
        f"space: {_FIXED['space']}",
        f"sizes: {x} {y} {z}",
        # One vector per array axis: the columns of the matrix, not its rows.
        "space directions: " + " ".join(_vector(lps[:3, axis]) for axis in range(3)),
        f"kinds: {_FIXED['kinds']}",
        f"encoding: {_FIXED['encoding']}",
        f"space origin: {_vector(lps[:3, 3])}",
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|Closed surface|",
        # Without the reference geometry an empty segmentation cannot be edited in Slicer.
        f"Segmentation_ConversionParameters:=Reference image geometry|{ras}{whole}|Image geometry description string.&",
        # Slicer's documentation says SourceRepresentation; its code reads and writes this name.
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]
    for number, segment in enumerate(segments):  # Slicer stops at the first number without an ID
        lines += _segment_lines(f"Segment{number}_", segment, voxels == segment.label)
    return lines


def _segment_lines(key: str, segment: Segment, mask: np.ndarray) -> list[str]:
    terminology = f"{_CONTEXT}~{_CATEGORY}~{segment.terminology}~^^~{_ANATOMY}"
    return [
        f"{key}ID:=Segment_{segment.label}",
        f"{key}Name:={segment.name}",
        f"{key}NameAutoGenerated:=0",  # 1 would let Slicer rename it
        f"{key}Color:={' '.join(_number(c) for c in segment.colour)}",
        f"{key}ColorAutoGenerated:=0",
        f"{key}LabelValue:={segment.label}",
        f"{key}Layer:=0",  # missing, every segment but the first is lost
        f"{key}Extent:={_extent(mask)}",
        f"{key}Tags:=Segmentation.Status:inprogress|TerminologyEntry:{terminology}|",
    ]


def _extent(mask: np.ndarray) -> str:
    """First and last index along each axis: Slicer cuts off what lies outside, and takes -1 for nothing."""
    bounds = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        bounds.append(f"{hit[0]} {hit[-1]}" if hit.size else "0 -1")
    return " ".join(bounds)


def _number(value: float) -> str:
    # repr keeps every bit; adding 0.0 turns -0.0 into 0.0.
    return repr(int(value)) if float(value).is_integer() else repr(float(value) + 0.0)


def _vector(values: Sequence[float] | np.ndarray) -> str:
    return "(" + ",".join(_number(value) for value in values) + ")"


def _compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    # No file name and no time in the gzip header: the bytes depend on the voxels alone.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=buffer, mtime=0) as stream:
        stream.write(data)
    return buffer.getvalue()


def _read_geometry(fields: Mapping[str, str]) -> Geometry:
    x, y, z = (int(n) for n in fields["sizes"].split())
    lps = np.eye(4)
    columns = fields["space directions"].split(" ")
    for axis in range(3):
        lps[:3, axis] = [float(v) for v in columns[axis].strip("()").split(",")]
    lps[:3, 3] = [float(v) for v in fields["space origin"].strip("()").split(",")]
    # Adding 0.0 turns -0.0 into 0.0.
    return Geometry((x, y, z), _RAS_TO_LPS @ lps + 0.0)


def _read_segment(fields: Mapping[str, str], key: str) -> Segment:
    r, g, b = (float(c) for c in fields[f"{key}Color"].split())
    tags = dict(tag.split(":", 1) for tag in fields[f"{key}Tags"].split("|") if tag)
    terminology = tags["TerminologyEntry"].split("~")[2]
    return Segment(int(fields[f"{key}LabelValue"]), fields[f"{key}Name"], (r, g, b), terminology)
