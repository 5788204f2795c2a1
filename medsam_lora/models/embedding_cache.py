"""What the encoder computes before anything that is trained, on disk, each slice once: embeddings or activations.

An entry is named by the hash of the slice it was computed from, so that there is nothing to keep in step: another crop,
another normalisation or a mirrored slice is another entry (with `train.flip` a slice has two, never more), and methods
that share base weights, input range, precision and cache point (`cache_points`) share the entries. Boxes have no part
in it: a jittered or a second prompt of the same slice finds its embedding there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# numpy has no bfloat16; the bits are stored as integers and the type in the file's name.
_TYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_NAMES: Final = {dtype: name for name, dtype in _TYPES.items()}
# Behind an entry's array: what a power cut leaves of a file can have its length and not its content.
_CHECK_BYTES: Final = 4
_STALE_S: Final = 3600.0


@dataclass(frozen=True)
class Found:
    """What a cache has of a batch of slices.

    Parameters
    ----------
    keys : list of B str
    entries : list of B Tensor of shape (M, ...), or None
        None where there was none yet.
    """

    keys: list[str]
    entries: list[Tensor | None]

    def pinned(self) -> Found:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, entries=[None if entry is None else entry.pin_memory() for entry in self.entries])


class EmbeddingCache:
    """A folder of embeddings or activations.

    Parameters
    ----------
    folder : Path
        Made when the first entry is written. Several caches and processes may share it.
    identity : mapping of str to plain data
        Everything besides the slice that an entry depends on: base weights, cache point, input range, image size,
        precision. Not the way attention is computed, as all agree but for rounding (`attention_choice`).
    max_bytes : int
        No entry is added once the folder's entries, those of other identities included, would exceed it; those there
        are still used.
    writers : int
        Processes that share the room that is left.

    Attributes
    ----------
    hits, misses : int
        Slices found and not found so far.
    full : bool
        Whether an entry was left out for want of room, or because it could not be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], max_bytes: int, writers: int = 1) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        _remove_stale(folder)
        self.bytes = sum(_size(path) for path in folder.glob("*/*") if path.suffix in (".npy", ".partial"))
        self.max_bytes = self.bytes + max(0, max_bytes - self.bytes) // writers
        self.hits = self.misses = 0
        self.full = False

    @property
    def gib(self) -> float:
        """Size of all entries in the folder in GiB."""
        return self.bytes / 2**30

    def keys(self, z: Tensor, present: Sequence[int]) -> list[str]:
        """The name of every slice's entry.

        Parameters
        ----------
        z : Tensor of float32, shape (B, M, X, Y)
            On the CPU.
        present : sequence of M int
            Which modalities the channels are.
        """
        head = repr((tuple(z.shape[1:]), tuple(present))).encode()
        return [hashlib.sha256(head + one.contiguous().numpy().tobytes()).hexdigest()[:32] for one in z]

    def look_up(self, z: Tensor, present: Sequence[int]) -> Found:
        """The entries of slices, as `keys` takes them."""
        keys = self.keys(z, present)
        return Found(keys, [self.read(key) for key in keys])

    def read(self, key: str) -> Tensor | None:
        """The entry of a slice, shape (M, ...), or None where it is not there or cannot be read."""
        for name, dtype in _TYPES.items():
            path = self.folder / f"{key}.{name}.npy"
            if path.is_file():
                try:
                    array = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
                    with path.open("rb") as handle:
                        handle.seek(-_CHECK_BYTES, os.SEEK_END)
                        check = handle.read()
                except (OSError, ValueError, EOFError):  # cut short by a full disk, say: computed again
                    return None
                if check != _check(array):
                    return None
                self.hits += 1
                return torch.from_numpy(array).view(dtype)
        return None

    def write(self, key: str, entry: Tensor) -> None:
        """Keep the entry of a slice, shape (M, ...), whole or not at all, where there is room."""
        self.misses += 1
        bits = entry.detach().cpu().contiguous()
        path = self.folder / f"{key}.{_NAMES[bits.dtype]}.npy"
        replaced = _size(path)
        if self.bytes - replaced + bits.nbytes > self.max_bytes:
            if not self.full:
                logger.warning(
                    "the cache %s is full (%.1f GiB), so further slices are computed each time; delete it, or raise "
                    "train.cache_gib",
                    self.folder.parent,
                    self.gib,
                )
            self.full = True
            return
        partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            array = bits.view(torch.int32 if bits.element_size() == 4 else torch.int16).numpy()
            with partial.open("wb") as handle:
                np.save(handle, array)
                handle.write(_check(array))
            partial.replace(path)
            self.bytes += _size(path) - replaced
        except OSError as error:
            # A cache saves time; a full disk is no reason to lose what has been trained.
            self.full, self.max_bytes = True, 0
            logger.warning("the cache cannot be written (%s), so further slices are computed each time", error)
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _check(array: np.ndarray) -> bytes:
    return zlib.crc32(np.ascontiguousarray(array).data).to_bytes(_CHECK_BYTES, "little")


def _size(path: Path) -> int:
    """Bytes of a file, 0 where it is not there: other processes replace and remove entries meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove_stale(folder: Path) -> None:
    """Remove what writers that were killed left behind; a younger file may still be written by another process."""
    for path in folder.glob("*/*.partial"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
