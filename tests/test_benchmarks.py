"""Every benchmark starts, and that of a step measures what it says; nothing here is timed."""

from __future__ import annotations

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("script", [p.name for p in sorted(FOLDER.glob("*.py")) if "__main__" in p.read_text()])
def test_it_starts(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it imports is there, and its options parse."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert not stop.value.code and script in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_step_is_measured_and_a_variant_that_fails_is_named(tmp_path: Path) -> None:
    words = ("--model", "vit_nano", "--image-size", 64, "--rounds", 1, "--steps", 1, "--out", "rows.csv")
    done = run(FOLDER / "train_step.py", *words, "--variants", "official fp32", "exact fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    official, exact = csv.DictReader((tmp_path / "rows.csv").open(newline=""))
    assert (official["variant"], exact["variant"]) == ("official fp32", "exact fp32")
    # The same function, with less kept for the backward pass.
    assert 0 < float(exact["saved_mib"]) < float(official["saved_mib"])
    assert float(exact["seconds"]) > 0 and float(exact["gemm_gflop_per_s"]) > 0
    assert "| exact fp32 |" in done.stdout
    done = run(FOLDER / "train_step.py", "--model", "vit_x", *words[2:], "--variants", "official fp32", cwd=tmp_path)
    assert done.returncode == 0 and "official fp32: failed" in done.stderr and "nothing was measured" in done.stdout


def test_the_encoder_is_measured(tmp_path: Path) -> None:
    words = ("--model", "vit_nano", "--image-size", 64, "--rounds", 1, "--out", "rows.csv", "--figure", "bars.png")
    done = run(FOLDER / "encoder.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    official, exact, unpadded = csv.DictReader((tmp_path / "rows.csv").open(newline=""))
    assert 0 < float(unpadded["tflop"]) < float(exact["tflop"]) <= 1.1 * float(official["tflop"])
    assert all(float(row["seconds"]) > 0 and float(row["peak_mib"]) > 100 for row in (official, exact, unpadded))
    # Each of a process of its own: what they share is not the peak of the one that started them.
    assert len({row["peak_mib"] for row in (official, exact, unpadded)}) > 1
    assert "| exact |" in done.stdout and (tmp_path / "bars.png").stat().st_size > 1000
