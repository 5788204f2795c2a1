"""What a run says of itself: command, versions, settings, time."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medsam_lora import __version__
from medsam_lora.config import Config
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.models import MODELS

RECORDED_PACKAGES = ("torch", "monai", "nibabel", "SimpleITK", "segment-anything", "loralib", "numpy", "scipy")


def run_record(config: Config | None = None) -> dict[str, Any]:
    """Command line, time and versions, and what must be said of the model, as plain data."""
    record: dict[str, Any] = {
        "medsam_lora": __version__,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
    }
    if config is not None:
        record["config"] = config.model_dump(mode="json")
        notice = MODELS[config.model.name].notice
        if notice is not None:
            record["notice"] = notice
    return record


def write_json(path: Path, data: Any) -> None:
    """Write JSON, indented, atomically."""
    write_bytes_atomically(path, (json.dumps(data, indent=2, default=str) + "\n").encode())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
