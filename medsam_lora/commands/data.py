"""``manifest``, ``verify`` and ``prepare``: from a folder of cases to prepared slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsam_lora.commands import options
from medsam_lora.errors import ConfigError

if TYPE_CHECKING:
    from medsam_lora.records import CaseRecord, Finding

FINDINGS_SHOWN = 10

manifest_app = typer.Typer(
    help="Make a manifest of cases, or exchange it with MSD datalists.", no_args_is_help=True, rich_markup_mode=None
)

OutManifest = Annotated[Path, typer.Option("--out", metavar="M.csv", help="The manifest to write.")]
Share = Annotated[float | None, typer.Option(min=0, max=1, help="Share of the patients in this split.")]


@manifest_app.command("build")
def manifest_build(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of BraTS cases, nested or flat.")],
    out: OutManifest,
    train: Share = None,
    val: Share = None,
    test: Share = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the splits.")] = 0,
) -> None:
    """Find BraTS cases under ROOT; write their manifest, split by patient."""
    from medsam_lora.stages.manifest import build_manifest

    shares = {"train": train, "val": val, "test": test}
    records = build_manifest(root, out, {name: share for name, share in shares.items() if share is not None}, seed)
    typer.echo(_manifest_summary(records, out))


@manifest_app.command("export")
def manifest_export(
    manifest: Annotated[Path, typer.Argument(metavar="M.csv", help="The manifest.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.json", help="The datalist to write.")],
) -> None:
    """Write the manifest as an MSD (decathlon) datalist, labels by name."""
    from medsam_lora.stages.manifest import export_datalist

    export_datalist(manifest, out)
    typer.echo(f"datalist: {out}")


@manifest_app.command("import")
def manifest_import(
    datalist: Annotated[Path, typer.Argument(metavar="FILE.json", help="An MSD (decathlon) datalist.")],
    out: OutManifest,
    root: options.RootOption = None,
) -> None:
    """Read an MSD (decathlon) datalist into a manifest, labels by name."""
    from medsam_lora.stages.manifest import import_datalist

    typer.echo(_manifest_summary(import_datalist(datalist, out, root), out))


def verify(
    manifest: Annotated[Path | None, typer.Argument(metavar="M.csv", help="The manifest.")] = None,
    manifest_option: Annotated[Path | None, typer.Option("--manifest", metavar="M.csv", hidden=True)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.csv", help="Findings [findings.csv beside the manifest].")
    ] = None,
    root: options.RootOption = None,
    workers: options.WorkersOption = None,
    config: options.ConfigOption = None,
    settings: options.SetOption = None,
) -> None:
    """Find every fault of every case; exit 2 where there is an error."""
    from medsam_lora.stages.verify import verify as verify_cases

    chosen = options.read_config(config, settings)
    path = manifest or manifest_option
    if path is None:
        raise ConfigError("no manifest given", remedy="Write medsam-lora verify M.csv.")
    table = out or path.parent / "findings.csv"
    findings = verify_cases(
        path,
        root,
        table,
        workers=options.processes(workers),
        max_bytes=options.max_bytes(chosen),
        nonfinite=chosen.data.nonfinite,
    )
    typer.echo(findings_summary(findings, table))
    raise typer.Exit(2 if any(finding.severity == "error" for finding in findings) else 0)


def prepare(
    manifest: options.ManifestOption,
    root: options.RootOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--prepared", metavar="DIR", help="Root of the prepared store [prepared].")
    ] = None,
    workers: options.WorkersOption = None,
    verified: Annotated[
        Path | None,
        typer.Option("--verified", metavar="FILE.csv", help="What verify noted [verified.csv beside the manifest]."),
    ] = None,
    config: options.ConfigOption = None,
    settings: options.SetOption = None,
) -> None:
    """Cut the cases into slices for training; skip what is there."""
    from medsam_lora.stages.prepare import prepare as prepare_cases

    chosen = options.read_config(config, settings)
    store = out or Path("prepared")
    folder, outcome = prepare_cases(
        manifest, root, store, chosen, workers=options.processes(workers), verified=verified
    )
    options.finish(outcome, "prepared", folder)


def findings_summary(findings: Sequence[Finding], table: Path) -> str:
    """Counts by severity and code, the first findings, and where all of them are.

    Examples
    --------
    >>> print(findings_summary([], Path("findings.csv")))
    no faults found
    all findings: findings.csv
    """
    counts = Counter((finding.severity, finding.code) for finding in findings)
    lines = [f"{severity}  {code}: {count}" for (severity, code), count in sorted(counts.items())]
    worst_first = sorted(findings, key=lambda finding: finding.severity != "error")
    for finding in worst_first[:FINDINGS_SHOWN]:
        place = f"{finding.case_id} {finding.file}".strip()
        lines.append(f"  {place}: {finding.detail}" + (f" -> {finding.remedy}" if finding.remedy else ""))
    if len(findings) > FINDINGS_SHOWN:
        lines.append(f"  ... and {len(findings) - FINDINGS_SHOWN} more")
    return "\n".join([*(lines or ["no faults found"]), f"all findings: {table}"])


def _manifest_summary(records: Sequence[CaseRecord], path: Path) -> str:
    counts = Counter(record.split for record in records)
    listed = ", ".join(f"{name or 'no split'} {counts[name]}" for name in ("train", "val", "test", "") if counts[name])
    patients = len({record.patient_id for record in records})
    return f"{options.cases(len(records))} of {patients} patients ({listed}): {path}"
