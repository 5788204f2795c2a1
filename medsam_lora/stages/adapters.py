"""Working with adapter files: what is in one, what it changes, and a stock SAM checkpoint with it merged in."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from medsam_lora.errors import AdapterError
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.models.assemble import load_segmenter
from medsam_lora.models.checkpoint import load_adapter
from medsam_lora.models.description import method_of
from medsam_lora.models.sam import SamModel, build

TOLERANCE: Final = 1e-4
"""Largest difference of logits, relative to the largest logit, that a merged model may have."""

KINDS: Final = (".pth", ".pt", ".safetensors")
DEFAULT_NAME: Final = "merged.pth"


def info(path: Path) -> dict[str, Any]:
    """What an adapter file says of itself. The base model is not needed.

    Returns
    -------
    dict
        ``file``, ``bytes``, ``content_sha256``; ``method``, ``options`` (those it reads), ``mergeable``; ``model``,
        ``base_sha256``, ``image_size``, ``grid``; ``modalities``, ``regions``, ``fusion``, ``postprocess``;
        ``parameters``, ``tensors`` and ``parameters_by_part``; ``package_version``.

    Raises
    ------
    AdapterError
        Where the file is missing or damaged, or of a method that this version does not know.
    """
    tensors, metadata = load_adapter(path)
    spec = method_of(metadata, path)
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + tensor.numel()
    options = metadata["method_options"]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "content_sha256": metadata["content_sha256"],
        "method": metadata["method"],
        "options": {name: options[name] for name in spec.options if name in options},
        "mergeable": spec.mergeable,
        "model": metadata["model_name"],
        "base_sha256": metadata["base_sha256"],
        "image_size": metadata["image_size"],
        "grid": metadata.get("grid", "padded"),
        "modalities": metadata["modalities"],
        "regions": metadata["regions"],
        "fusion": metadata["fusion"],
        "postprocess": metadata.get("postprocess", {}),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tensors": len(tensors),
        "parameters_by_part": parts,
        "package_version": metadata["package_version"],
    }


def merge(path: Path, out: Path | None = None, weights: str | None = None) -> dict[str, Any]:
    """Write a stock checkpoint of the base model with the adapter merged in, and check that it computes the same.

    Parameters
    ----------
    path : Path
        The adapter.
    out : Path, optional
        ``.pth``, ``.pt`` or ``.safetensors``; refused where it exists. ``merged.pth`` beside the adapter by default.
    weights : str, optional
        Where the base weights are, if not where they were at training.

    Returns
    -------
    dict
        ``out``, ``sha256``, ``model``, ``largest_difference`` (of the logits of one random image, relative to the
        largest), ``fusion`` (which is not part of the checkpoint), ``image_size``.

    Raises
    ------
    AdapterError
        Where the method or the grid is none that stock weights can hold, or the merged model computes something else.
    """
    out = path.with_name(DEFAULT_NAME) if out is None else out
    if out.suffix not in KINDS:
        raise AdapterError(f"the suffix {out.suffix!r} names no kind of checkpoint", path=out, remedy="Write .pth.")
    if out.exists():
        raise AdapterError("the file exists", path=out, remedy="Give another name, or delete it.")
    _, metadata = load_adapter(path)
    refuse_unmergeable(path, metadata)
    segmenter, _ = load_segmenter(path, weights)
    sam = segmenter.sam
    state = segmenter.adaptation.merge()
    if out.suffix == ".safetensors":
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
    # Under another name until it has been found right.
    unchecked = out.with_name(f"{out.stem}.unchecked{out.suffix}")
    write_bytes_atomically(unchecked, data)
    try:
        expected = _logits(sam)
        found = _logits(build(sam.name, str(unchecked), sam.image_size))
        scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
        difference = float((found - expected).abs().max()) / scale
        if not difference <= TOLERANCE:
            raise AdapterError(
                f"the merged model's logits differ by {difference:.1e} of the largest",
                path=path,
                remedy="Keep the adapter file beside the base checkpoint, and report this.",
            )
        os.replace(unchecked, out)  # noqa: PTH105
    finally:
        unchecked.unlink(missing_ok=True)
    return {
        "out": str(out),
        "sha256": sha256_of(out),
        "model": sam.name,
        "image_size": sam.image_size,
        "fusion": metadata["fusion"],
        "largest_difference": difference,
    }


def refuse_unmergeable(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter whose computation no checkpoint of the stock classes can hold.

    Parameters
    ----------
    path : Path
        Of the adapter, for the message.
    metadata : mapping
        Of the adapter.

    Raises
    ------
    AdapterError
    """
    instead = "medsam-lora export with --format onnx, monai-bundle: they hold the whole computation"
    if not method_of(metadata, path).mergeable:
        raise AdapterError(
            f"method {metadata['method']} cannot be merged into stock SAM weights: it adds computation of its own",
            path=path,
            remedy=f"Use {instead}.",
        )
    if metadata.get("grid", "padded") != "padded":
        # The weights would load, and compute something else on every picture that is not square.
        raise AdapterError(
            "it was trained on the unpadded grid, which the stock classes do not compute",
            path=path,
            remedy=f"Use {instead}, or train with model.grid=padded.",
        )


def diff(path: Path, other: Path | None = None, weights: str | None = None) -> dict[str, Any]:
    """What an adapter changes in its base model, or how two adapter files differ.

    Parameters
    ----------
    path : Path
    other : Path, optional
        A second adapter; no base model is needed then.
    weights : str, optional
        Where the base weights are, if not where they were at training.

    Returns
    -------
    dict
        ``against`` (the base's hash, or the other file); ``metadata`` (keys that differ, with both values);
        ``only_here`` and ``only_there`` (names); ``tensors``: a list with ``name``, ``shape``, ``norm`` (Frobenius,
        of the base's or the first file's tensor), ``change`` (norm of the difference) and ``relative`` (their ratio,
        None where the norm is 0), the largest first.

    Raises
    ------
    AdapterError
        Where a file is damaged or does not fit the base weights.
    """
    if other is not None:
        (first, here), (second, there) = load_adapter(path), load_adapter(other)
        keys = sorted((here.keys() | there.keys()) - {"content_sha256"})
        return {
            "against": str(other),
            "metadata": {k: [here.get(k), there.get(k)] for k in keys if here.get(k) != there.get(k)},
            "only_here": [name for name in first if name not in second],
            "only_there": [name for name in second if name not in first],
            "tensors": _changes(first, second),
        }
    segmenter, metadata = load_segmenter(path, weights)
    adaptation = segmenter.adaptation
    with adaptation.disable():
        base = {name: tensor.clone() for name, tensor in segmenter.sam.state_dict().items()}
    after = adaptation.merge() if adaptation.report.mergeable else segmenter.sam.state_dict()
    # What the base has no tensor for stands beside it: named, not compared.
    changed = {name: tensor for name, tensor in after.items() if name in base and not torch.equal(tensor, base[name])}
    return {
        "against": metadata["base_sha256"],
        "metadata": {},
        "only_here": [name for name in adaptation.state() if name not in base],
        "only_there": [],
        "tensors": _changes({name: base[name] for name in changed}, changed),
    }


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, tensor in before.items():
        if name not in after:
            continue
        if tensor.shape != after[name].shape:
            shapes = [list(tensor.shape), list(after[name].shape)]
            rows.append({"name": name, "shape": shapes, "norm": None, "change": None, "relative": None})
            continue
        norm = float(tensor.double().norm())
        change = float((after[name].double() - tensor.double()).norm())
        relative = change / norm if norm > 0 else None
        rows.append({"name": name, "shape": list(tensor.shape), "norm": norm, "change": change, "relative": relative})
    return sorted(rows, key=lambda row: -(row["change"] if row["change"] is not None else float("inf")))


@torch.no_grad()
def _logits(sam: SamModel) -> Tensor:
    size = sam.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    logits, _ = sam(pixels, torch.tensor([[size / 4, size / 4, size / 2, size / 2]]))
    return logits
