"""``run``, ``sweep`` and ``demo``: all stages in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsam_lora.commands import options


def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Which stages, with which options.")],
    settings: options.SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the results [out/NAME].")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Start at this stage; earlier results stand.")
    ] = None,
    root: options.RootOption = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="M.csv", help="The manifest [made from --root].")
    ] = None,
    device: options.DeviceOption = "auto",
    workers: options.WorkersOption = None,
    jobs: options.JobsOption = 1,
) -> None:
    """Run a pipeline: all stages for every method, one summary."""
    from medsam_lora.stages.run import run_file

    code = run_file(
        pipeline,
        settings or (),
        out,
        start=start,
        root=root,
        manifest=manifest,
        device=device,
        workers=options.processes(workers),
        jobs=jobs,
    )
    raise typer.Exit(code)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="A pipeline, and the settings to vary in it.")],
    settings: options.SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the results [out/NAME].")] = None,
    root: options.RootOption = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="M.csv", help="The manifest [made from --root].")
    ] = None,
    device: options.DeviceOption = "auto",
    workers: options.WorkersOption = None,
    jobs: options.JobsOption = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the points, and do nothing.")] = False,
) -> None:
    """Vary settings of a pipeline: a run for every point, one table, one figure."""
    from medsam_lora.stages.sweep import sweep_file

    code = sweep_file(
        file,
        settings or (),
        out,
        root=root,
        manifest=manifest,
        device=device,
        workers=options.processes(workers),
        jobs=jobs,
        dry_run=dry_run,
    )
    raise typer.Exit(code)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results.")] = Path("demo"),
    device: options.DeviceOption = "auto",
) -> None:
    """Run everything on a synthetic cohort, in minutes."""
    from medsam_lora.stages.demo import demo as run_demo

    raise typer.Exit(run_demo(out, device, options.processes(None)))
