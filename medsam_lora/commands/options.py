"""Options that several sub-commands share, said once, and what they print alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from medsam_lora.processes import cores

if TYPE_CHECKING:
    from medsam_lora.config import Config
    from medsam_lora.records import StageOutcome

ManifestOption: TypeAlias = Annotated[Path, typer.Option("--manifest", metavar="M.csv", help="The manifest.")]
RootOption: TypeAlias = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Data root of the manifest's paths [its own folder].")
]
ConfigOption: TypeAlias = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.yaml", help="Settings by section.")
]
SetOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting, over those of --config. Repeatable."),
]
WorkersOption: TypeAlias = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Processes [one per CPU core].")
]
JobsOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--jobs", metavar="N", min=1, help="Runs at a time, each with its share of the cores or a GPU of its own."
    ),
]
DeviceOption: TypeAlias = Annotated[
    str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto [CUDA where there is one].")
]
SplitOption: TypeAlias = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="Only this split's cases: train, val or test.")
]
BoxesOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--boxes", metavar="FILE.csv", help="Box prompts (case_id,k,i0,j0,i1,j1) [from the reference]."),
]


def read_config(path: Path | None, settings: list[str] | None) -> Config:
    """The settings of ``--config`` and ``--set``, checked whole before any work."""
    from medsam_lora.config import load_config

    return load_config(path, settings or ())


def max_bytes(config: Config) -> int:
    """The cap of ``data.max_gib`` in bytes."""
    return int(config.data.max_gib * 2**30)


def processes(workers: int | None) -> int:
    """The number of worker processes: `workers`, else one per CPU core that this process may use."""
    if workers is not None:
        return workers
    return cores()


def finish(outcome: StageOutcome, verb: str, where: Path) -> None:
    """Print what a stage did and where, and exit with its code."""
    skipped = f", {len(outcome.skipped)} there already" if outcome.skipped else ""
    failed = f", {len(outcome.failed)} failed (failures.csv)" if outcome.failed else ""
    typer.echo(f"{verb} {cases(len(outcome.done))}{skipped}{failed}: {where}")
    raise typer.Exit(outcome.exit_code)


def cases(count: int) -> str:
    """A number of cases in words.

    Examples
    --------
    >>> cases(1), cases(0)
    ('1 case', '0 cases')
    """
    return f"{count} case{'' if count == 1 else 's'}"
