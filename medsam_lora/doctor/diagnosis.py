"""The checks one after the other, and what is left of them: lines, ``doctor.json`` and ``doctor.png``."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medsam_lora.doctor import CHECKS
from medsam_lora.doctor.picture import write_picture
from medsam_lora.doctor.result import Result, fault
from medsam_lora.doctor.sources import Given, examine_with
from medsam_lora.doctor.subject import Subject
from medsam_lora.errors import ConfigError, MedsamLoraError, nearest
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.stages.record import write_json

logger = logging.getLogger(__name__)


def diagnose(
    given: Given,
    *,
    out: Path | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    steps: int = 150,
    minutes: float = 10.0,
    tell: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Examine a set-up.

    Parameters
    ----------
    given : Given
    out : Path, optional
        Receives ``doctor.json`` and ``doctor.png``.
    only : sequence of str
        Keys of `CHECKS`; all of them by default.
    device : str
    steps, minutes
        Bounds of the attempt to overfit; see `Subject`.
    tell : callable, optional
        Called with each row as soon as it is there.

    Returns
    -------
    list of dict
        One per check, in order: ``check``, ``status`` (``ok``, ``FAULT`` or ``skipped``), ``measured``, ``meaning``,
        ``remedy``, ``numbers``.

    Raises
    ------
    MedsamLoraError
        Where settings or data cannot be used, so that there is nothing to examine.
    """
    for name in only:
        if name not in CHECKS:
            guess = nearest(name, list(CHECKS))
            hint = f"; did you mean {guess}?" if guess else ""
            raise ConfigError(f"unknown check {name!r}{hint}", remedy=f"Choose of {', '.join(CHECKS)}.")
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="medsam-lora-doctor-") as folder:
        subject = examine_with(given, Path(folder), device, steps, minutes)
        subject.segmenter  # noqa: B018  weights that are not there are unusable input, not a fault of the set-up
        before = None if out is None else subject.predicted_by_base()
        rows = []
        for name, check in CHECKS.items():
            if only and name not in only:
                continue
            rows.append(_guarded(check, subject).row(name))
            if tell is not None:
                tell(rows[-1])
        if out is not None and before is not None:
            write_json(out / "doctor.json", rows)
            write_picture(out / "doctor.png", subject, before)
    return rows


def exit_code(rows: Sequence[Mapping[str, Any]]) -> int:
    """1 where a check found a fault, else 0."""
    return int(any(row["status"] == "FAULT" for row in rows))


def _guarded(check: Callable[[Subject], Result], subject: Subject) -> Result:
    """The result of a check; what stops it is a finding, and the other checks go on."""
    try:
        return check(subject)
    except MedsamLoraError as error:
        where = f"{error.path.name}: " if error.path is not None else ""
        return fault("stopped", f"{where}{error.message}.", error.remedy or "Run medsam-lora verify.")
    except torch.OutOfMemoryError as error:
        return fault(
            "stopped",
            f"Memory ran out ({str(error).splitlines()[0]}).",
            "Lower train.batch_size or model.image_size, or see medsam-lora info --plan.",
        )
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        logger.debug("check stopped", exc_info=error)
        text = " ".join(str(error).split())
        return fault(
            "stopped",
            f"The program's own code failed here ({type(error).__name__}: {text}).",
            "Undo your last change to the code or the settings; report this where you made none.",
        )
