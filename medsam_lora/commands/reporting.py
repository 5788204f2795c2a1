"""``report``: what runs left, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of pipelines or of single runs, or with per_case.csv."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The report to write.")],
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="M.csv", help="The manifest [as the runs recorded it].")
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Data root [as the runs recorded it].")
    ] = None,
    max_mib: Annotated[
        float, typer.Option("--max-mib", metavar="MIB", min=0, help="Budget of the viewer's voxels; 0: no viewer.")
    ] = 48.0,
    title: Annotated[str | None, typer.Option("--title", metavar="TEXT", help="Title of the report.")] = None,
) -> None:
    """Write scores, cases, viewer and run record as one HTML file."""
    from medsam_lora.stages.report import report as write_report

    path = write_report(runs, out, manifest=manifest, root=root, max_mib=max_mib, title=title)
    typer.echo(f"report: {path}")
