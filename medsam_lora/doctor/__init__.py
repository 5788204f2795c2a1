"""The diagnosis of a set-up on its own data: what made such systems fail, looked for one by one, in minutes.

Every check runs the program's own stages on a few slices and looks at what they do; see docs/doctor.md. A new check is
one function of a `Subject` and one line of `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from medsam_lora.doctor import files, frames, learning, losses, masks, pixels, settings, start
from medsam_lora.doctor.result import Result
from medsam_lora.doctor.subject import Subject

CHECKS: Final[Mapping[str, Callable[[Subject], Result]]] = {
    "settings": settings.check,
    "labels": masks.labels,
    "input": pixels.check,
    "box": frames.box,
    "way_back": frames.way_back,
    "fusion": masks.fusion,
    "score": masks.score,
    "loss": losses.check,
    "base": start.base,
    "identity": start.identity,
    "step": start.step,
    "moved": learning.moved,
    "overfit": learning.overfit,
    "reload": files.reload,
    "merge": files.merge,
    "predict": files.predicted,
    "run": files.run,
}
"""The checks in their order: what is wrong early makes what comes later worthless."""
