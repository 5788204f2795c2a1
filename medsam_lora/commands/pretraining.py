"""``pretrain``: the weights of vit_nano from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsam_lora.commands import options


def pretrain(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the weights and their record.")],
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE.yaml", help="Settings, in a section `pretrain`.")
    ] = None,
    settings: options.SetOption = None,
    device: options.DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in this folder was stopped.")] = False,
) -> None:
    """Train vit_nano on synthetic scenes that are not tumours."""
    from medsam_lora.stages.pretrain import load_section, pretrain_nano

    typer.echo(str(pretrain_nano(out, load_section(config, settings or ()), device, resume)))
