"""The progress bar: on a terminal only, never on standard output, never changing the items."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from medsam_lora.progress import track

SCRIPT = "from medsam_lora.progress import track; print(sum(track([1, 2, 3], 'adding')))"


def run_on_terminal(environment: dict[str, str]) -> tuple[str, str]:
    """Standard output, and what a terminal on standard error showed."""
    terminal, end = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=end, env=os.environ | environment, check=True
    )
    os.close(end)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # Linux reports the closed other end this way
        pass
    os.close(terminal)
    return done.stdout.decode(), shown.decode()


def test_items_come_in_order_one_at_a_time(capsys):
    taken = []

    def numbers():
        for n in range(3):
            taken.append(n)
            yield n

    items = track(numbers(), "counting", 3)
    assert taken == []
    assert next(items) == 0
    assert taken == [0]
    assert list(items) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_shows_the_bar_on_standard_error_only():
    out, shown = run_on_terminal({"TERM": "xterm", "MEDSAM_LORA_NO_PROGRESS": ""})
    assert out == "6\n"
    assert "adding" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_the_environment_silences_it():
    assert run_on_terminal({"TERM": "xterm", "MEDSAM_LORA_NO_PROGRESS": "1"}) == ("6\n", "")
