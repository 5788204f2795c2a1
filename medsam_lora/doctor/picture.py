"""``doctor.png``: for every slice what the encoder sees, with box and reference in its frame, and the masks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from medsam_lora.analysis.overlays import Colour, Panel, mosaic
from medsam_lora.doctor.subject import Subject, tumour_of
from medsam_lora.doctor.watch import grey, watching
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.metrics.overlap import count
from medsam_lora.stages.overview import BOX_COLOUR, PREDICTION_COLOUR, REFERENCE_COLOUR
from medsam_lora.transforms.resizing import masks_to_model_frame

AFTER_COLOUR: Colour = (240, 90, 200)
# The modalities in which whole tumour is best seen.
_PREFERRED = ("t2f", "t1c", "t2w", "t1n")


def write_picture(path: Path, subject: Subject, before: Sequence[np.ndarray]) -> None:
    """Write the picture.

    Parameters
    ----------
    path : Path
    subject : Subject
    before : sequence of ndarray of bool, shape (R, X, Y)
        Masks of the base model.
    """
    segmenter = subject.segmenter
    with watching(segmenter) as seen:
        after = subject.predicted(segmenter)
    rows = []
    for n, case in enumerate(subject.slices):
        shape = (case.crop.shape[0], case.crop.shape[1])
        channel = case.modalities.index(next(m for m in _PREFERRED if m in case.modalities))
        reference = tumour_of(case)
        shown = grey(seen.pixels[n], shape, segmenter.sam.image_size)
        framed = masks_to_model_frame(torch.from_numpy(reference)[None, None], segmenter.sam.image_size)[0, 0].numpy()
        picture = shown[min(channel, len(shown) - 1)].numpy()
        framed = framed[: picture.shape[0], : picture.shape[1]]
        box = _filled(picture.shape, seen.boxes_model[n][0].tolist())
        low, high = float(shown.min()), float(shown.max())
        image = np.asarray(case.image[0, channel], np.float32)
        rows.append(
            [
                Panel(
                    # 0 is background to the drawing, and black to the encoder.
                    picture - min(low, 0.0),
                    {REFERENCE_COLOUR: framed, BOX_COLOUR: box},
                    f"{case.case_id}:{case.ks[0]}  {low:.0f} to {high:.0f}",
                ),
                _with_mask(image, reference, before[n][0], PREDICTION_COLOUR, "base"),
                _with_mask(image, reference, after[n][0], AFTER_COLOUR, f"after {subject.updates} updates"),
            ]
        )
    legend = {
        "reference": REFERENCE_COLOUR,
        "box, model frame": BOX_COLOUR,
        "base": PREDICTION_COLOUR,
        "trained on these slices": AFTER_COLOUR,
    }
    buffer = io.BytesIO()
    mosaic(rows, legend, "doctor: what the model sees (grey values) and says", 300).save(buffer, "PNG", optimize=True)
    write_bytes_atomically(path, buffer.getvalue())


def _with_mask(image: np.ndarray, reference: np.ndarray, mask: np.ndarray, colour: Colour, name: str) -> Panel:
    mask = mask.astype(bool)
    counts = count(reference, mask)
    dice = 2 * counts.tp / max(counts.n_reference + counts.n_prediction, 1)
    return Panel(image, {REFERENCE_COLOUR: reference, colour: mask}, f"{name}  Dice {dice:.3f}")


def _filled(shape: tuple[int, ...], box: Sequence[float]) -> np.ndarray:
    """A box XYXY in model pixels as a mask of that part of the frame."""
    x0, y0, x1, y1 = (round(edge) for edge in box)
    mask = np.zeros(shape, bool)
    mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask
