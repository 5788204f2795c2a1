"""Everything a training run needs to go on as if it had never stopped, in one file written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from medsam_lora.errors import TrainingError
from medsam_lora.io.files import sha256_of, write_bytes_atomically

logger = logging.getLogger(__name__)

FORMAT = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state, keeping the one before it as ``<name>.previous``.

    Parameters
    ----------
    path : Path
    state : dict
        Tensors, optimiser state and plain Python values only: it is read back with ``weights_only=True``.

    Notes
    -----
    torch does not notice a flipped bit inside tensor data, so the file's sha256 is written beside it.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    data = buffer.getvalue()
    digest = _digest_path(path)
    if path.is_file() and digest.is_file():
        write_bytes_atomically(_previous(path), path.read_bytes())
        write_bytes_atomically(_digest_path(_previous(path)), digest.read_bytes())
    write_bytes_atomically(path, data)
    write_bytes_atomically(digest, hashlib.sha256(data).hexdigest().encode() + b"\n")


def load_state(path: Path) -> dict[str, Any]:
    """Read the newest whole state: the file, or else the one before it.

    Raises
    ------
    TrainingError
        Where neither is there and whole.
    """
    problems = []
    for candidate in (path, _previous(path)):
        problem = _fault(candidate)
        if problem is None:
            try:
                state = torch.load(candidate, weights_only=True, map_location="cpu")
            except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
                problem = str(error).splitlines()[0]
            else:
                if state.get("format") == FORMAT:
                    return state
                problem = f"written in format {state.get('format')}, this version reads {FORMAT}"
        problems.append(f"{candidate.name}: {problem}")
        logger.warning("%s: %s", candidate, problem)
    raise TrainingError(
        f"no state to resume from ({'; '.join(problems)})",
        path=path,
        remedy="Train again without --resume.",
    )


def _fault(path: Path) -> str | None:
    if not path.is_file():
        return "no such file"
    digest = _digest_path(path)
    if not digest.is_file():
        return "its .sha256 is missing"
    return None if sha256_of(path) == digest.read_text().strip() else "its sha256 does not fit, the file is damaged"


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
