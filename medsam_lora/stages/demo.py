"""The demo: a synthetic cohort, a small SAM, and LoRA, offline and in minutes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml

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
    text = files("medsam_lora.stages").joinpath("demo.yaml").read_text(encoding="utf-8")
    code = run(parse_pipeline(yaml.safe_load(text)), folder, device=device, workers=workers)
    print(f"picture: {folder / 'overview.png'}")
    return code
