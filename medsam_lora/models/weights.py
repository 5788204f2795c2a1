"""Base weights: where they are, how to fetch them, and reading them so that a wrong file cannot pass.

Those of `vit_nano`, which were made by this project, lie in the package. Third-party weights are never part of it. They
are looked for in

1. the folder named by ``MEDSAM_LORA_WEIGHTS_DIR``, or, where that is not set, ``shared/weights`` beside the checkout;
2. the cache, ``MEDSAM_LORA_CACHE_DIR`` or ``~/.cache/medsam-lora``;

and else downloaded into the cache. Importing this module needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medsam_lora.errors import WeightsError, nearest
from medsam_lora.io.files import sha256_of
from medsam_lora.models import MODELS, ModelSpec
from medsam_lora.progress import SILENCE

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_DIR_VARIABLE: Final = "MEDSAM_LORA_WEIGHTS_DIR"
CACHE_DIR_VARIABLE: Final = "MEDSAM_LORA_CACHE_DIR"

EMBEDDED_DIR: Final = Path(__file__).resolve().parent / "data"
"""Folder of the weights that are part of this package."""

_CHECKOUT = Path(__file__).resolve().parents[2]
_LISTED = 4  # names of each kind in a message


def model_spec(name: str) -> ModelSpec:
    """The entry of `MODELS` called `name`.

    Raises
    ------
    WeightsError
        Naming the nearest known model.

    Examples
    --------
    >>> model_spec("vit_b").image_size
    1024
    >>> model_spec("vitb")
    Traceback (most recent call last):
        ...
    medsam_lora.errors.WeightsError: no model is called 'vitb'. Remedy: Did you mean vit_b? ...
    """
    if name in MODELS:
        return MODELS[name]
    guess = nearest(name, list(MODELS))
    hint = f"Did you mean {guess}? " if guess else ""
    raise WeightsError(f"no model is called {name!r}", remedy=f"{hint}Known: {', '.join(MODELS)}.")


def weights_dir() -> Path:
    """The folder of official weights; it need not exist."""
    folder = os.environ.get(WEIGHTS_DIR_VARIABLE)
    return Path(folder).expanduser() if folder else _CHECKOUT.parent / "shared" / "weights"


def cache_dir() -> Path:
    """The folder that downloads go to; it need not exist."""
    folder = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "medsam-lora"


def locate(name: str) -> Path | None:
    """The weights of a model where they are on this machine, else None; nothing is read or fetched.

    Raises
    ------
    WeightsError
        For an unknown model.
    """
    spec = model_spec(name)
    if spec.file_name is None:
        return None
    folders = (EMBEDDED_DIR,) if spec.embedded else (weights_dir(), cache_dir())
    candidates = (folder / spec.file_name for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


def fetch(name: str, progress: bool = True) -> Path:
    """The weights of a model, downloaded into the cache unless they are here, their hash checked.

    Parameters
    ----------
    name : str
    progress : bool
        Show a progress bar, on a terminal only.

    Raises
    ------
    WeightsError
        Where a file that is here is not the official one, or the download fails.
    """
    spec = model_spec(name)
    found = locate(name)
    if found is None and spec.embedded:
        raise WeightsError(
            f"the weights of {name} are missing from the package",
            path=EMBEDDED_DIR / str(spec.file_name),
            remedy="Install medsam-lora again.",
        )
    if found is None:
        return download(spec, cache_dir(), progress)
    _check_hash(found, spec.sha256)
    return found


def download(spec: ModelSpec, folder: Path, progress: bool = True) -> Path:
    """Download the file of a model into `folder`; it appears there whole and with the right hash, or not at all.

    Parameters
    ----------
    spec : ModelSpec
        With `file_name`, `url` and `sha256`.
    folder : Path
        Made if need be.
    progress : bool
        Show a progress bar, on a terminal only.

    Raises
    ------
    WeightsError
        Naming the URL, the file wanted, and what to do without a network.
    """
    import logging

    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    assert spec.url is not None and spec.file_name is not None
    target = folder / spec.file_name
    bar = _Bar(spec.file_name) if progress and _on_terminal() else None
    # pooch reads 1 KiB at a time by default, which a bar over gigabytes would be slowed by.
    downloader = pooch.HTTPDownloader(progressbar=bar or False, chunk_size=2**20, timeout=30)
    try:
        pooch.retrieve(
            spec.url,
            known_hash=f"sha256:{spec.sha256}",
            fname=spec.file_name,
            path=folder,
            downloader=downloader,
        )
    except (OSError, ValueError) as error:  # no network or disk; pooch raises ValueError for a wrong hash
        text = " ".join(str(error).split())
        raise WeightsError(
            f"{spec.name} could not be downloaded from {spec.url} ({text[:200]})",
            path=target,
            remedy=f"Fetch that URL elsewhere, put the file into a folder and set {WEIGHTS_DIR_VARIABLE} to it.",
        ) from error
    finally:
        if bar is not None:
            bar.close()
    return target


def load_state(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a checkpoint, a ``.safetensors`` file or one of `torch.save`, without running any code from it.

    Parameters
    ----------
    path : Path
    sha256 : str, optional
        What the file's hash must be. A flipped bit inside a tensor shows in nothing else.

    Returns
    -------
    dict of str to Tensor
        On the CPU.

    Raises
    ------
    WeightsError
        Where the file is missing, empty, truncated, not a checkpoint, not a flat state dict, or another file.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsError("no such file", path=path, remedy="Check model.weights, or run medsam-lora weights list.")
    if sha256 is not None:
        _check_hash(path, sha256)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # What torch.load raises for a truncated, an empty, a cut legacy, and a foreign or malicious file.
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise WeightsError(
            f"not a readable checkpoint ({type(error).__name__}: {text[:160]})", path=path, remedy="Copy it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()) or not state:
        raise WeightsError(
            "not a flat state dict of tensors", path=path, remedy="Save model.state_dict() and nothing around it."
        )
    return state


def check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], dropped: Iterable[str] = (), path: Path | None = None
) -> dict[str, Tensor]:
    """The tensors of `state` that a model holds, once every name and shape has been found right.

    Parameters
    ----------
    state, expected : mapping of str to Tensor
        A checkpoint, and the model's own state dict.
    dropped : iterable of str
        Names the checkpoint may hold besides; exactly these.
    path : Path, optional
        The checkpoint's file, for messages.

    Raises
    ------
    WeightsError
        Listing missing and unexpected names, other shapes, and tensors with NaN or infinity.
    """
    kept = {name: tensor for name, tensor in state.items() if name not in set(dropped)}
    faults = {
        "missing": [name for name in expected if name not in kept],
        "unexpected": [name for name in kept if name not in expected],
        "of another shape": [
            f"{name} {tuple(kept[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in kept and kept[name].shape != tensor.shape
        ],
        "not finite": [n for n, t in kept.items() if t.is_floating_point() and not bool(t.isfinite().all())],
    }
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in faults.items() if names)
        raise WeightsError(f"tensors {text}", path=path, remedy="Give the weights of the model named by model.name.")
    return kept


def sha256_of_state(state: Mapping[str, Tensor]) -> str:
    """Hex digest over names, types, shapes and bytes of tensors, whatever their order or device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_hash(path: Path, sha256: str | None) -> None:
    found = sha256_of(path)
    if found != sha256:
        raise WeightsError(
            f"its sha256 is {found[:12]}..., not {str(sha256)[:12]}... as published",
            path=path,
            remedy="Delete it and run medsam-lora weights fetch (install medsam-lora again, where it lies in the "
            "package), or name it as model.weights if it is meant.",
        )


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get(SILENCE) != "1"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


class _Bar:
    """What pooch asks of a progress bar (attribute `total`; `update`, `reset`, `close`), drawn by rich."""

    def __init__(self, description: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(description, total=None)
        self._progress.start()

    @property
    def total(self) -> float | None:
        return self._progress.tasks[0].total

    @total.setter
    def total(self, value: float | None) -> None:
        self._progress.update(self._task, total=value)

    def update(self, n: int) -> None:
        self._progress.update(self._task, advance=n)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop()
