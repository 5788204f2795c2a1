"""``export``: a run's model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its adapter.safetensors.")],
    kind: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="sam-pth, safetensors, onnx or monai-bundle.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="File or folder to write [RUN/export/...].")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W", help="The base weights: a file, official or random [as at training]."),
    ] = None,
) -> None:
    """Write a run's model for other programs: stock SAM weights, ONNX, a MONAI bundle; checked."""
    from medsam_lora.stages.export import export as write

    done = write(run, kind, out, weights)
    for path in done["files"]:
        typer.echo(path)
    typer.echo(
        f"{kind}: the largest difference from the run's own model is {done['largest_difference']:.1e} of the largest "
        f"value: {done['out']}"
    )
