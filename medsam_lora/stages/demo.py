"""The demo: a synthetic cohort, a small SAM, and LoRA, offline and in minutes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from medsam_lora.models.assemble import choose_device
from medsam_lora.stages.pipeline import parse_pipeline
from medsam_lora.stages.run import run

NOTICE = (
    "The demo uses a synthetic cohort and vit_nano, a SAM of a few million parameters that was pre-trained on\n"
    "synthetic scenes without tumours and is part of the package. It is for demonstration and tests, not for\n"
    "patients: the demo shows how the program works, and says nothing about patients."
)


def demo(out: Path | None = None, device: str = "auto", workers: int = 1) -> int:
    """Run the demo pipeline.

    Parameters
    ----------
    out : Path, optional
        ``demo`` in the working directory by default.
    device : str
    workers : int

    Returns
    -------
    int
        Exit code.
    """
    folder = Path("demo") if out is None else out
    print(NOTICE)
    code = run(parse_pipeline(settings(device, workers)), folder, device=device, workers=workers)
    print(f"picture: {folder / 'overview.png'}")
    return code


def settings(device: str = "auto", workers: int = 1) -> dict[str, Any]:
    """The demo's pipeline as a mapping, for a machine.

    Parameters
    ----------
    device : str
    workers : int
        On a CPU, where there are several, two processes of one thread train: the model is so small that two threads of one
        process wait for each other.

    Returns
    -------
    dict

    Examples
    --------
    >>> settings("cpu", workers=8)["train"]["processes"], settings("cpu")["train"]["processes"]
    (2, 1)
    """
    text = files("medsam_lora.stages").joinpath("demo.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    data["train"]["processes"] = min(workers, 2) if choose_device(device).type == "cpu" else 1
    return data
