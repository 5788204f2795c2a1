"""Whether image, box and mask stand on the same pixels: what is drawn into a case is followed to the model and back."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import torch

from medsam_lora.doctor.result import Result, fault, ok
from medsam_lora.doctor.subject import HALF, Subject, tumour_of
from medsam_lora.doctor.watch import Seen, box_iou, bright_box, repeating, watching
from medsam_lora.geometry import place
from medsam_lora.labels import SNFH
from medsam_lora.prompts.sources import reference_boxes
from medsam_lora.records import CaseVolumes, PreparedSlices
from medsam_lora.stages.case_boxes import BoxOptions
from medsam_lora.stages.predict import Task, native_masks
from medsam_lora.stages.train import run_metadata
from medsam_lora.transforms.resizing import through_decoder_grid
from medsam_lora.transforms.stages import PreparePlan

BOX_IOU = 0.8
"""Least overlap of the box and what it is around, in the model frame. Half a pixel at each edge costs 0.05 of a box of
40 pixels; a missing offset, a missing or double scale, or swapped axes leave 0 to 0.3."""
NEAR_PX = 1.5
"""Model pixels by which an edge may be off whatever the IoU: rounding takes much of a box of few pixels."""
BLUNTED = 0.05
"""Dice that the way back may lose beyond what the decoder's grid costs."""
BRIGHT = 1000


def box(subject: Subject) -> Result:
    """Whether the box that the prompt encoder is given is around the same pixels as what the encoder sees."""
    found: dict[str, float] = {}
    wrong: list[str] = []
    where = ""
    for path, seen in _followed(subject).items():
        overlaps = []
        for pixels, boxes in zip(seen.pixels, seen.boxes_model, strict=True):
            # One slice: its boxes for every modality, whose union is around all of what was drawn.
            expected, given = bright_box(pixels[0]), torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
            overlap = box_iou(expected, given)
            near = float((expected - given).abs().max()) <= NEAR_PX
            overlaps.append(overlap)
            if overlap < BOX_IOU and not near:
                wrong.append(path)
                where = where or f" (drawn at {_edges(expected)}, box {_edges(given)}, x0 y0 x1 y1)"
        found[path] = min(overlaps, default=0.0)
    numbers = {f"iou_{path.split()[0]}": value for path, value in found.items()}
    measured = "least IoU of the box with what it is around, in the model frame: " + ", ".join(
        f"{path} {value:.2f}" for path, value in found.items()
    )
    wrong += [path for path, value in found.items() if not value > 0]
    if wrong:
        return fault(
            measured + where,
            f"The boxes of {' and '.join(dict.fromkeys(wrong))} are in another frame than the image: an offset of the "
            "crop or a scale is missing or applied twice, or x and y are swapped.",
            "Give boxes as (i0, j0, i1, j1) on voxel edges of the slice, and leave the way to the model frame to "
            "prompts.box.to_model.",
            **numbers,
        )
    return ok(measured, **numbers)


def way_back(subject: Subject) -> Result:
    """Whether a mask comes back to the voxels it was drawn on, on the crop grid and on the file's own."""
    segmenter = subject.segmenter
    dices, ceilings, shifts = {}, [], []
    case, drawn = _drawn(subject.slices[0])
    with watching(segmenter) as seen, repeating(segmenter, seen):
        mask = subject.predicted_of(segmenter, case, HALF)[0]
    reach = through_decoder_grid(torch.from_numpy(drawn)[None, None], segmenter.sam.image_size)[0, 0].numpy()
    ceilings.append(_dice(reach, drawn))
    dices["crop"] = _dice(mask, drawn)
    shifts.append(_shift(mask, drawn))
    if subject.records:
        volumes, native = _drawn_volumes(subject, subject.slices[0])
        with watching(segmenter) as seen, repeating(segmenter, seen):
            masks = predict_volumes(subject, volumes, subject.slices[0], HALF)
        dices["file"] = _dice(masks[0], native)
        shifts.append(_shift(masks[0], native))
    least = min(ceilings) - BLUNTED
    numbers = {f"dice_{path}": value for path, value in dices.items()}
    numbers |= {"ceiling": min(ceilings), "shift_voxels": max(shifts)}
    measured = (
        "what is drawn into a case comes back with Dice "
        + ", ".join(f"{value:.3f} on the {path}'s grid" for path, value in dices.items())
        + f" (the decoder's grid allows {min(ceilings):.3f}), {max(shifts):.2f} voxels away"
    )
    if min(dices.values()) < least or not max(shifts) < 1:
        return fault(
            measured,
            "Masks do not come back to where they were seen: the way from the model frame to the voxels is not the "
            "inverse of the way there.",
            "Undo resize, padding, crop and orientation exactly; compare transforms.resizing and inference.volume.",
            **numbers,
        )
    return ok(measured, **numbers)


def predict_volumes(
    subject: Subject, volumes: CaseVolumes, case: PreparedSlices, threshold: float | None = None
) -> np.ndarray:
    """Native masks (R, X, Y, Z) of one slice of a case, from its volumes, as the stage ``predict`` makes them.

    Parameters
    ----------
    subject : Subject
    volumes : CaseVolumes
        With its reference, from which the box is taken.
    case : PreparedSlices
        Says which slice.
    threshold : float, optional
        The user's by default.
    """
    assert volumes.label_map is not None
    config = subject.config
    metadata = run_metadata(subject.segmenter, config, subject.store)
    kind, fewest = metadata["prompts"]["kind"], metadata["prompts"]["min_voxels"]
    task = Task(
        subject.segmenter,
        PreparePlan.from_json(metadata["plan"]),
        subject.root,
        subject.work,
        BoxOptions(kind, fewest),
        subject.options_at(threshold),
        int(config.data.max_gib * 2**30),
        {},
    )
    only = np.where(slice_of(case), volumes.label_map, 0).astype(np.uint8)
    return native_masks(task, volumes, reference_boxes(only, volumes.geometry, "WT", kind, fewest))


def slice_of(case: PreparedSlices, reach: int = 0) -> np.ndarray:
    """Where the slices of a case, and `reach` on either side of each, lie: bool, shape case.native.shape."""
    marked = np.zeros(case.crop.shape, bool)
    for k in case.ks:
        marked[:, :, max(k - reach, 0) : k + reach + 1] = True
    return place(marked, case.crop, case.native)


def _followed(subject: Subject) -> dict[str, Seen]:
    """What the encoders are given on each path, of slices into which a rectangle, and the tumour itself, were drawn."""
    segmenter = subject.segmenter
    drawn = [_drawn(subject.slices[0])[0]]
    # Boxes per component leave small components out.
    drawn += [_repainted(case) for case in subject.slices if subject.config.prompt.boxes == "union"]
    paths: dict[str, Seen] = {}
    dataset = subject.dataset(segmenter, drawn)
    with watching(segmenter) as paths["training"], torch.no_grad():
        for item in range(len(dataset)):
            batch = dataset.batch([item]).to(segmenter.device)
            segmenter(batch.z, batch.boxes)
    with watching(segmenter) as paths["validation"]:
        for case in drawn:
            subject.predicted_of(segmenter, case)
    if subject.records:
        with watching(segmenter) as paths["prediction from the files"]:
            predict_volumes(subject, _drawn_volumes(subject, subject.slices[0])[0], subject.slices[0])
    return paths


def _rectangle(shape: tuple[int, int]) -> tuple[slice, slice]:
    # Neither square, nor central, nor near the diagonal, so that no swap or flip leaves it where it was.
    x, y = shape
    return slice(round(0.15 * x), round(0.45 * x)), slice(round(0.5 * y), round(0.9 * y))


def _drawn(case: PreparedSlices) -> tuple[PreparedSlices, np.ndarray]:
    """A slice that shows a bright rectangle and nothing else, with its label; and the rectangle."""
    drawn = np.zeros(case.crop.shape[:2], bool)
    drawn[_rectangle((case.crop.shape[0], case.crop.shape[1]))] = True
    return _repainted(case, drawn), drawn


def _repainted(case: PreparedSlices, drawn: np.ndarray | None = None) -> PreparedSlices:
    """A slice whose image shows a mask, by default the tumour's, in place of anatomy."""
    mask = tumour_of(case) if drawn is None else drawn
    image = np.broadcast_to(np.where(mask, BRIGHT, 1), case.image.shape).astype(np.int16)
    label = (mask[None] * SNFH).astype(np.uint8)
    # z-scores of 3.2 and -1, so that the window shows them as white and black.
    return dataclasses.replace(
        case, image=image, label=label, mean=np.full_like(case.mean, 240.0), std=np.full_like(case.std, 239.0)
    )


def _drawn_volumes(subject: Subject, case: PreparedSlices) -> tuple[CaseVolumes, np.ndarray]:
    """A case whose volumes show a bright block through the slice and nothing else; and the part on that slice."""
    volumes = subject.volumes(case.case_id)
    block = np.zeros(case.crop.shape, bool)
    rows, columns = _rectangle((case.crop.shape[0], case.crop.shape[1]))
    k = case.ks[0]
    block[rows, columns, max(k - 1, 0) : k + 2] = True
    native = place(block, case.crop, case.native)
    image = np.broadcast_to(np.where(native, BRIGHT, 1), volumes.image.shape).astype(np.int16)
    label = (native * SNFH).astype(np.uint8)
    return replace(volumes, image=image, label_map=label), native & slice_of(case)


def _dice(mask: np.ndarray, other: np.ndarray) -> float:
    total = int(mask.sum()) + int(other.sum())
    return 2 * int((mask & other).sum()) / total if total else 0.0


def _shift(mask: np.ndarray, other: np.ndarray) -> float:
    """Distance of the centres of two masks in voxels; infinite where one is empty."""
    if not mask.any() or not other.any():
        return float("inf")
    return float(np.linalg.norm(np.argwhere(mask).mean(axis=0) - np.argwhere(other).mean(axis=0)))


def _edges(edges: torch.Tensor) -> str:
    return " ".join(f"{edge:.0f}" for edge in edges.tolist())
