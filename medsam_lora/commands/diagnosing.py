"""``doctor``: what is wrong with a set-up, on its own data, in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from medsam_lora.commands import options


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE.yaml", help="Settings by section, or a pipeline file [the run's]."),
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="M.csv", help="The manifest [the pipeline's, or from --root].")
    ] = None,
    root: options.RootOption = None,
    prepared: Annotated[
        Path | None,
        typer.Option("--prepared", metavar="DIR", help="Examine the slices of this store instead of preparing some."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="LABEL", help="Of a pipeline's methods [the first that trains something]."),
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Examine this trained run as well.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of doctor.json and doctor.png.")
    ] = None,
    checks: Annotated[
        list[str] | None, typer.Option("--check", metavar="NAME", help="Only this check. Repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Most updates of an attempt to overfit.")] = 150,
    minutes: Annotated[float, typer.Option("--minutes", min=0, help="Most minutes of the attempts to overfit.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with stable keys.")] = False,
    device: options.DeviceOption = "auto",
    settings: options.SetOption = None,
) -> None:
    """Find what is wrong with a set-up on your own data; exit 1 on a fault."""
    from medsam_lora.doctor.diagnosis import diagnose, exit_code
    from medsam_lora.doctor.result import conclusion, line
    from medsam_lora.doctor.sources import Given

    def tell(row: Mapping[str, Any]) -> None:
        if not as_json:
            typer.echo(line(dict(row)))

    given = Given(config, tuple(settings or ()), manifest, root, prepared, run, method)
    rows = diagnose(given, out=out, only=checks or (), device=device, steps=steps, minutes=minutes, tell=tell)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(conclusion(rows))
    raise typer.Exit(exit_code(rows))
