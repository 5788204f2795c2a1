"""Slices in batches that become smaller where memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from medsam_lora.errors import DataError
from medsam_lora.models.allocator import is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass
class BatchLimit:
    """The most slices that fitted since memory ran out; None as long as it never did."""

    slices: int | None = None


def in_batches(
    items: Sequence[int], size: int, work: Callable[[list[int]], None], limit: BatchLimit, case_id: str
) -> None:
    """Do some work on items batch by batch; a batch that memory has no room for is halved and done again.

    Parameters
    ----------
    items : sequence of int
    size : int
        Largest batch.
    work : callable
        Given the items of a batch, as often as it takes: what it has done of one that failed it does again.
    limit : BatchLimit
        Remembers what fitted, for later cases too.
    case_id : str
        For the message.

    Raises
    ------
    DataError
        ``out_of_memory``, where not even one slice fits.
    """
    first = 0
    while first < len(items):
        chunk = list(items[first : first + min(size, limit.slices or size)])
        if _fits(work, chunk):
            first += len(chunk)
            continue
        # Only now, when the exception and the frames that it held are gone, can their tensors be freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(chunk) == 1:
            raise DataError(
                "memory ran out with a single slice at a time",
                case_id=case_id,
                remedy="Predict with predict.amp=bf16, a model of a smaller image size, or on another device.",
                code="out_of_memory",
            )
        limit.slices = len(chunk) // 2
        logger.warning("memory ran out with %d slices at a time; going on with %d", len(chunk), limit.slices)


def _fits(work: Callable[[list[int]], None], chunk: list[int]) -> bool:
    try:
        work(chunk)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
