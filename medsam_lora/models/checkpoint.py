"""Adapter files: the trained tensors of an adaptation and everything needed to use them, in one safetensors file.

The metadata is one JSON text under one key, since safetensors writes several keys in no fixed order: the same adapter
gives the same bytes. safetensors notices a truncated file but not a flipped bit, so a hash over tensors and metadata
is stored among the metadata and checked at every load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medsam_lora import __version__
from medsam_lora.errors import AdapterError
from medsam_lora.io.files import write_bytes_atomically

FORMAT_VERSION: Final = 1
REQUIRED_METADATA: Final[Mapping[str, str]] = {
    "method": "the method's name",
    "method_options": "its options (MethodConfig as a mapping)",
    "model_name": "name of the base model",
    "base_sha256": "hash of the base weights",
    "image_size": "side of the model frame, pixels",
    "input_spec": "how z-scores become pixels (InputSpec as a mapping)",
    "plan": "how its slices were prepared: crop and z-score among others (PreparePlan as a mapping)",
    "modalities": "channel order",
    "regions": "regions predicted",
    "fusion": "name of the fusion",
}
"""Metadata that an adapter cannot be used without. Others may be added; the versions and the hash are added here."""

_KEY: Final = "medsam_lora"
_HASH: Final = "content_sha256"
_COPY_AGAIN: Final = "Copy the file again from where it was made, or train again."


def save_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write an adapter file, whole or not at all; equal content gives equal bytes.

    Parameters
    ----------
    path : Path
    tensors : mapping of str to Tensor
        On any device; types are kept.
    metadata : mapping of str to JSON-able values
        With all of `REQUIRED_METADATA`.

    Returns
    -------
    str
        The content hash, as stored.

    Raises
    ------
    AdapterError
        Where the metadata is incomplete or not JSON (NaN and infinity are not), or a tensor holds a non-finite value.
    """
    missing = [name for name in REQUIRED_METADATA if name not in metadata]
    if missing:
        raise AdapterError(f"the adapter's metadata lacks {', '.join(missing)}", path=path)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError(
            f"{len(broken)} tensors hold NaN or infinity ({broken[0]} first): training has diverged",
            path=path,
            remedy="Lower train.lr, raise train.warmup_share, or set train.clip_norm.",
        )
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    record = {**metadata, "package_version": __version__, "format_version": FORMAT_VERSION}
    record.pop(_HASH, None)
    try:
        digest = _content_hash(stored, _canonical(record))
        text = _canonical({**record, _HASH: digest})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the adapter's metadata cannot be written as JSON ({error})", path=path) from error
    write_bytes_atomically(path, safetensors.torch.save(stored, {_KEY: text}))
    return digest


def load_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter file and verify its hash.

    Returns
    -------
    tensors : dict of str to Tensor
        On the CPU.
    metadata : dict
        What was saved, with ``package_version``, ``format_version`` and ``content_sha256``.

    Raises
    ------
    AdapterError
        Where the file is missing, truncated, changed, of another program, or of a later format.
    """
    if not path.is_file():
        raise AdapterError("no such adapter file", path=path, remedy="Check the path; train leaves it in the run.")
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            text = (handle.metadata() or {}).get(_KEY)
            # Whose file it is comes first: one of another program may be of any size.
            metadata = {} if text is None else _parse(text, path)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()} if metadata else {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"not a whole safetensors file ({' '.join(str(error).split())})", path=path, remedy=_COPY_AGAIN
        ) from error
    if not metadata:
        raise AdapterError(
            "a safetensors file, but not an adapter of medsam-lora", path=path, remedy="Give an adapter.safetensors."
        )
    _check_version(metadata, path)
    stored = metadata.get(_HASH)
    found = _content_hash(tensors, _canonical({k: v for k, v in metadata.items() if k != _HASH}))
    if found != stored:
        raise AdapterError(
            f"the content was changed after saving: its hash is {found}, the one stored {stored}",
            path=path,
            remedy=_COPY_AGAIN,
        )
    missing = [name for name in REQUIRED_METADATA if name not in metadata]
    if missing:
        raise AdapterError(f"the adapter's metadata lacks {', '.join(missing)}", path=path)
    return tensors, metadata


def check_base(
    metadata: Mapping[str, Any],
    model_name: str,
    base_sha256: str | None,
    image_size: int | None = None,
    path: Path | None = None,
    grid: str | None = None,
) -> None:
    """Refuse a base model that an adapter was not trained on, naming the weights of both.

    Parameters
    ----------
    metadata : mapping
        From `load_adapter`.
    model_name : str
    base_sha256 : str or None
        Hash of the base weights in use.
    image_size : int, optional
        Checked where given.
    path : Path, optional
        Of the adapter, for the message.
    grid : str, optional
        ``padded`` or ``unpadded``; checked where given. An adapter that says nothing of it was trained padded.

    Raises
    ------
    AdapterError
        Naming what the adapter was trained on and what it was given.
    """
    both = both_bases(metadata, base_sha256)
    if metadata["model_name"] != model_name:
        raise AdapterError(
            f"the adapter was trained on {metadata['model_name']}, not on {model_name} ({both})",
            path=path,
            remedy=f"Set model.name={metadata['model_name']}.",
        )
    if metadata["base_sha256"] != base_sha256:
        raise AdapterError(
            f"the adapter was trained on base weights {metadata['base_sha256']}, these are {base_sha256}",
            path=path,
            remedy="Set model.weights to the checkpoint that the adapter was trained on.",
        )
    if image_size is not None and metadata["image_size"] != image_size:
        raise AdapterError(
            f"the adapter was trained at {metadata['image_size']} px, the model is built at {image_size} px ({both})",
            path=path,
            remedy=f"Set model.image_size={metadata['image_size']}.",
        )
    trained_on = metadata.get("grid", "padded")
    if grid is not None and trained_on != grid:
        raise AdapterError(
            f"the adapter was trained on the {trained_on} grid, the model is built on the {grid} one: another function",
            path=path,
            remedy=f"Set model.grid={trained_on}, or train anew.",
        )


def both_bases(metadata: Mapping[str, Any], base_sha256: str | None) -> str:
    """The hashes of the base that an adapter was trained on and of the one in use, for a message.

    Parameters
    ----------
    metadata : mapping
        From `load_adapter`.
    base_sha256 : str or None
    """
    return f"the adapter's base is {metadata['base_sha256']}, this one {base_sha256}"


def _canonical(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError("the metadata is not JSON", path=path, remedy=_COPY_AGAIN) from error
    if not isinstance(metadata, dict) or not metadata:
        raise AdapterError("the metadata is not a JSON mapping", path=path, remedy=_COPY_AGAIN)
    return metadata


def _check_version(metadata: Mapping[str, Any], path: Path) -> None:
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"adapter format {version}, this version reads {FORMAT_VERSION}",
            path=path,
            remedy=f"Use medsam-lora {metadata.get('package_version', 'of the time')} or later.",
        )


def _content_hash(tensors: Mapping[str, Tensor], metadata_text: str) -> str:
    digest = hashlib.sha256(metadata_text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
