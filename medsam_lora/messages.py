"""What the program says while it works: lines on standard error, also from the processes that it starts."""

from __future__ import annotations

import logging
import sys
from typing import Final

PACKAGE: Final = "medsam_lora"


class StandardError(logging.Handler):
    """Writes each message as one line, warnings and errors with their level.

    Parameters
    ----------
    prefix : str
        Before every line.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        # Looked up at every message: a progress bar puts itself in front of sys.stderr while it runs.
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"{self.prefix}{level}{record.getMessage()}", file=sys.stderr, flush=True)


def level_of_messages() -> int:
    """The level from which this process's messages are said, to be handed to the processes that it starts."""
    return logging.getLogger(PACKAGE).getEffectiveLevel()


def say_messages(level: int, prefix: str = "") -> None:
    """Write the package's messages of this level and above to standard error.

    Parameters
    ----------
    level : int
        Of `logging`.
    prefix : str
        Before every line.
    """
    messages = logging.getLogger(PACKAGE)
    messages.setLevel(level)
    messages.handlers = [StandardError(prefix)]
