"""Progress of long work: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")

SILENCE: Final = "MEDSAM_LORA_NO_PROGRESS"
"""Environment variable: 1 silences bars on a terminal as well."""


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, with a progress bar where standard error is a terminal.

    Parameters
    ----------
    items : iterable
    description : str
    total : int, optional
        Number of items, where `items` has no length.

    Notes
    -----
    ``MEDSAM_LORA_NO_PROGRESS=1`` silences it on a terminal as well.
    """
    if not sys.stderr.isatty() or os.environ.get(SILENCE) == "1":
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description, total, console=Console(stderr=True), transient=True)
