"""Box prompts: made from masks, read from a table, and brought to the grid and the frame where they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from medsam_lora.prompts import box

BOX_KINDS: Final[Mapping[str, Callable[[np.ndarray, int], np.ndarray]]] = {
    "union": box.union_box,
    "per_component": box.component_boxes,
}
"""How the tumour of a slice becomes boxes: (mask (X, Y), min_voxels) to boxes (n, 4)."""

REFERENCE_BOX: Final = "reference_box"
BOX_TABLE: Final = "box_table"
NO_PROMPT: Final = "none"

PROMPT_SOURCES: Final[Mapping[str, str]] = {
    REFERENCE_BOX: "boxes around the reference of the very case that is predicted: an upper bound, not a result in use",
    BOX_TABLE: "boxes of a table case_id,k,i0,j0,i1,j1 in the frame of the file",
    NO_PROMPT: "no prompt: every slice that shows brain is predicted, whole",
}
"""Where boxes come from, as named in every row of results."""
