"""``compare``: runs held against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    tables: Annotated[
        list[Path], typer.Argument(metavar="PER_CASE.csv", help="Tables of evaluate, or run folders with one.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the tables and plots.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="LABEL", help="What the others are compared with [first method]."),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="COLUMN",
            help="What to compare, by column. Repeatable, or a comma list [dice; of a challenge also "
            "lesionwise_dice, hd95_mm].",
        ),
    ] = None,
    bootstrap: Annotated[int, typer.Option("--bootstrap", metavar="N", min=1, help="Resamples of patients.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the resamples.")] = 0,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="SECTION.KEY", help="Draw Dice and costs against this setting [method.rank]."),
    ] = None,
    all_pairs: Annotated[bool, typer.Option("--all-pairs", help="Compare every method with every other.")] = False,
) -> None:
    """Compare runs case by case: statistics, a page of tables, plots."""
    chosen = [name.strip() for text in metrics or () for name in text.split(",") if name.strip()]
    from medsam_lora.analysis.comparison_text import sentence
    from medsam_lora.analysis.wording import region_name
    from medsam_lora.stages.compare import compare as compare_runs

    rows = compare_runs(
        tables,
        out,
        baseline=baseline,
        metrics=chosen or None,
        bootstrap=bootstrap,
        seed=seed,
        all_pairs=all_pairs,
        by=by,
    )
    # One line per pair and region; what the other metrics say stands on the page.
    for row in rows:
        if row["metric"] == rows[0]["metric"]:
            typer.echo(f"{region_name(row['region'])}: {sentence(row)}")
    typer.echo(f"compared: {out / 'comparison.md'}")
