"""A run in forms that other programs read: stock SAM weights, ONNX graphs, a MONAI bundle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from medsam_lora.errors import AdapterError, ConfigError, nearest
from medsam_lora.models.assemble import load_segmenter
from medsam_lora.models.checkpoint import load_adapter
from medsam_lora.stages.adapters import merge, refuse_unmergeable
from medsam_lora.stages.export_contract import contract, threshold_of
from medsam_lora.stages.record import write_json
from medsam_lora.stages.train import ADAPTER_FILE

SIDE_CAR: Final = "export.json"

Exporter = Callable[[Path, Path, str | None], dict[str, Any]]
"""(adapter, out, weights) to what was written."""


def export(run: Path, kind: str, out: Path | None = None, weights: str | None = None) -> dict[str, Any]:
    """Write a run's model in another format, checked, whole or not at all.

    Parameters
    ----------
    run : Path
        A run folder (or an adapter file).
    kind : str
        A key of `FORMATS`.
    out : Path, optional
        A file for ``sam-pth`` and ``safetensors``, a folder for the others; refused where it exists. By default
        under ``export/`` of the run.
    weights : str, optional
        Where the base weights are, if not where they were at training.

    Returns
    -------
    dict
        ``format``, ``out``, ``files`` (every path written) and ``largest_difference`` (relative to the largest value,
        between the exported model and the one that was trained).

    Raises
    ------
    ConfigError
        For an unknown format, or where a package that it needs is not installed.
    AdapterError
        Where the run has no adapter, the method cannot be exported so, or the exported model computes something else.
    """
    if kind not in FORMATS:
        guess = nearest(kind, list(FORMATS))
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"unknown format {kind!r}{hint}", remedy=f"Use --format {', '.join(FORMATS)}.")
    adapter = run if run.is_file() else run / ADAPTER_FILE
    if not adapter.is_file():
        raise AdapterError(
            "no adapter of a finished run", path=adapter, remedy="Give the folder that medsam-lora train wrote."
        )
    target = adapter.parent / "export" / DEFAULT_NAMES[kind] if out is None else out
    if target.exists():
        raise AdapterError("it exists", path=target, remedy="Give another --out, or delete it.")
    return {"format": kind, "out": str(target), **FORMATS[kind](adapter, target, weights)}


def _stock(suffix: str) -> Exporter:
    def write(adapter: Path, out: Path, weights: str | None) -> dict[str, Any]:
        _, metadata = load_adapter(adapter)
        if out.suffix not in (suffix, ".pt" if suffix == ".pth" else suffix):
            raise AdapterError(f"this format is a file named *{suffix}", path=out, remedy=f"Give --out NAME{suffix}.")
        refuse_unmergeable(adapter, metadata)
        side_car = out.with_suffix(".json")
        if side_car.exists():
            raise AdapterError("it exists", path=side_car, remedy="Give another --out, or delete it.")
        done = merge(adapter, out, weights)
        try:
            write_json(side_car, _stock_contract(adapter, weights, done, out))
        except BaseException:
            out.unlink(missing_ok=True)
            raise
        return {"files": [str(out), str(side_car)], "largest_difference": done["largest_difference"]}

    return write


def _stock_contract(adapter: Path, weights: str | None, done: Mapping[str, Any], out: Path) -> dict[str, Any]:
    segmenter, metadata = load_segmenter(adapter, weights)
    size = segmenter.sam.image_size
    return {
        "format": "sam-pth" if out.suffix != ".safetensors" else "safetensors",
        **contract(segmenter, metadata, threshold_of(adapter)),
        "weights": {
            "file": out.name,
            "sha256": done["sha256"],
            "names": "those of the official checkpoints; a strict load_state_dict of segment_anything's Sam takes them",
            "positions": f"tables of a {size} px frame: build the classes with img_size={size}, see docs/export.md",
        },
        "checked": {"largest_difference": done["largest_difference"]},
    }


def _onnx(adapter: Path, out: Path, weights: str | None) -> dict[str, Any]:
    from medsam_lora.stages.export_onnx import write_onnx

    with whole_folder(out) as folder:
        return {"largest_difference": write_onnx(adapter, folder, weights), "files": _files(folder, out)}


def _monai_bundle(adapter: Path, out: Path, weights: str | None) -> dict[str, Any]:
    from medsam_lora.stages.export_bundle import write_bundle

    with whole_folder(out) as folder:
        return {"largest_difference": write_bundle(adapter, folder, weights), "files": _files(folder, out)}


def _files(folder: Path, out: Path) -> list[str]:
    return [str(out / path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` where no error was raised, and is removed where one was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        # mkdtemp makes 0700 folders; results are shared with colleagues as the umask allows.
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


FORMATS: Final[Mapping[str, Exporter]] = {
    "sam-pth": _stock(".pth"),
    "safetensors": _stock(".safetensors"),
    "onnx": _onnx,
    "monai-bundle": _monai_bundle,
}
"""The formats by the name that ``--format`` takes."""

DEFAULT_NAMES: Final[Mapping[str, str]] = {
    "sam-pth": "sam.pth",
    "safetensors": "sam.safetensors",
    "onnx": "onnx",
    "monai-bundle": "monai-bundle",
}
