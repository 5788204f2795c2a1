"""``train``, ``predict``, ``evaluate`` and ``check-submission``: from prepared slices to scores, here or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from medsam_lora.commands import options

PreparedOption = Annotated[Path, typer.Option("--prepared", metavar="DIR", help="Root of the prepared store.")]
RunOption = Annotated[Path, typer.Option("--run", metavar="DIR", help="The run folder (adapter, config, log).")]


def train(
    run: RunOption,
    prepared: PreparedOption = Path("prepared"),
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="M.csv", help="Says the splits [as they were prepared].")
    ] = None,
    # The store holds all that training reads; accepted so that one line of options serves every stage.
    root: Annotated[Path | None, typer.Option("--root", metavar="DIR", hidden=True)] = None,
    device: options.DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's saved state.")] = False,
    config: options.ConfigOption = None,
    settings: options.SetOption = None,
) -> None:
    """Train the adaptation on the train split; Ctrl-C saves and stops."""
    chosen = options.read_config(config, settings)
    from medsam_lora.stages.train import train as train_method

    record = train_method(manifest, prepared, run, chosen, device=device, resume=resume)
    if not record:  # one of several processes under torchrun, of which the first one tells
        return
    typer.echo(
        f"trained {record['method']} ({record['trainable_parameters']:,} parameters, {record['n_train_cases']} cases) "
        f"in {record['duration_s']:.0f} s: {run}"
    )


def predict(
    manifest: options.ManifestOption,
    run: RunOption,
    out: Annotated[Path, typer.Option("--out", "--predictions", metavar="DIR", help="Folder of the predictions.")],
    root: options.RootOption = None,
    boxes: options.BoxesOption = None,
    split: options.SplitOption = None,
    device: options.DeviceOption = "auto",
    config: options.ConfigOption = None,
    settings: options.SetOption = None,
) -> None:
    """Segment whole cases on their native grids (NIfTI and .seg.nrrd)."""
    chosen = options.read_config(config, settings)
    from medsam_lora.stages.predict import predict as predict_cases

    outcome = predict_cases(manifest, root, run, out, chosen, boxes=boxes, split=split, device=device)
    options.finish(outcome, "predicted", out)


def evaluate(
    manifest: options.ManifestOption,
    predictions: Annotated[Path, typer.Option("--predictions", metavar="DIR", help="What predict wrote.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of per_case.csv and summary.json.")],
    root: options.RootOption = None,
    boxes: Annotated[
        Path | None,
        typer.Option("--boxes", metavar="FILE.csv", help="Boxes of the floor [prompts.csv of --predictions]."),
    ] = None,
    split: options.SplitOption = None,
    challenge: Annotated[
        str | None,
        typer.Option(
            "--challenge",
            metavar="NAME",
            help="Also score as this challenge, lesion by lesion: brats2023-gli, -men, -met, -ssa or -ped.",
        ),
    ] = None,
    workers: options.WorkersOption = None,
    config: options.ConfigOption = None,
    settings: options.SetOption = None,
) -> None:
    """Score predictions per case and volume, beside the filled box."""
    chosen = options.read_config(config, settings)
    from medsam_lora.io.tables import SUMMARY_COLUMNS, read_table
    from medsam_lora.stages.evaluate import evaluate as evaluate_cases

    _, outcome = evaluate_cases(
        manifest,
        root,
        predictions,
        out,
        split=split,
        boxes=boxes,
        challenge=challenge or chosen.evaluate.challenge,
        bootstrap=chosen.evaluate.bootstrap,
        seed=chosen.evaluate.seed,
        workers=options.processes(workers),
    )
    for row in read_table(out / "summary.csv", SUMMARY_COLUMNS):
        typer.echo(_summary_line(row))
    for finding in outcome.failed:
        typer.echo(f"failed: {finding.case_id}: {finding.detail}", err=True)
    options.finish(outcome, "evaluated", out)


def check_submission(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder whose files will be sent.")],
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="M.csv", help="The cases asked for [not checked].")
    ] = None,
) -> None:
    """Check a folder by the BraTS submission rules; exit 2 on a failure."""
    from medsam_lora.io.manifest import read_manifest
    from medsam_lora.stages.check_submission import check_submission as check_folder

    cases = None if manifest is None else [case.case_id for case in read_manifest(manifest)]
    findings = check_folder(folder, cases)
    for finding in findings:
        typer.echo(f"{finding.file or finding.case_id}: {finding.code}: {finding.detail} -> {finding.remedy}")
    count = f"{len(findings)} failure{'' if len(findings) == 1 else 's'}"
    typer.echo(f"{count}: {folder}" if findings else f"acceptable: {folder}")
    raise typer.Exit(2 if findings else 0)


def _summary_line(row: Mapping[str, str]) -> str:
    mean, low, high = (float(row[key]) if row[key] else float("nan") for key in ("dice_mean", "dice_low", "dice_high"))
    of = options.cases(int(row["n_cases"]))
    return f"{row['method']:<14}{row['region']:<4}Dice {mean:.3f} (95 % {low:.3f} to {high:.3f}) over {of}"
