"""The numbers that the report derives from rows of ``per_case.csv``, each with the name of what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medsam_lora.analysis.statistics import bootstrap_mean
from medsam_lora.report.collect import Row, Run


@dataclass(frozen=True)
class Number:
    """A number of the page and where it is found again.

    Parameters
    ----------
    value : float
    source : str
        ``s0/12/dice``: file `s0`, data line 12, column ``dice``. ``derived/STATISTIC/COLUMN/RUN/REGION``: computed
        from that column of that run's rows. ``r0/duration_s``: key of the record `r0`.
    text : str
        The number in full: the cell as it stands, or its `repr`.
    """

    value: float
    source: str
    text: str


@dataclass(frozen=True)
class Interval:
    """A mean over cases with its bootstrap interval of 95 % over patients."""

    mean: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Difference:
    """The paired difference of a run to the reference run.

    Parameters
    ----------
    dice : Interval
    won, pairs : Number
        Cases in which the run is the better one, of those that both have.
    """

    dice: Interval
    won: Number
    pairs: Number


@dataclass(frozen=True)
class HeadlineRow:
    """One run and region of the headline table.

    Parameters
    ----------
    label : str
    region : str
    is_floor, is_reference : bool
        The reference is the first run that is not the floor; differences are to it.
    n_cases, n_failed : Number
    scores : mapping of str to Interval
        By column of ``per_case.csv``: Dice, and where a challenge was named its HD95 and lesion-wise Dice.
    difference : Difference or None
    """

    label: str
    region: str
    is_floor: bool
    is_reference: bool
    n_cases: Number
    n_failed: Number
    scores: Mapping[str, Interval]
    difference: Difference | None


HEADLINE_COLUMNS = ("dice", "hd95_mm", "lesionwise_dice")


def headline(runs: Sequence[Run], floor: str, bootstrap: int, seed: int) -> list[HeadlineRow]:
    """The headline table, regions one after the other.

    Parameters
    ----------
    runs : sequence of Run
    floor : str
        Method name of the floor.
    bootstrap, seed : int
        As in `analysis.statistics.bootstrap_mean`.
    """
    reference = next((run for run in runs if run.method != floor), None)
    regions = dict.fromkeys(region for run in runs for region in run.regions)
    table = []
    for region in sorted(regions, key=list(regions).index):
        for run in runs:
            rows = rows_of(run, region)
            if not rows:
                continue
            scores = {}
            for column in HEADLINE_COLUMNS:
                values = [row.number(column) for row in rows]
                if None not in values:
                    name = f"{column}/{run.label}/{region}"
                    scores[column] = _interval(
                        [v for v in values if v is not None], [r["patient_id"] for r in rows], name, bootstrap, seed
                    )
            other = None if reference is None or run is reference else rows_of(reference, region)
            table.append(
                HeadlineRow(
                    run.label,
                    region,
                    run.method == floor,
                    run is reference,
                    count(f"n/case_id/{run.label}/{region}", len(rows)),
                    count(f"failed/status/{run.label}/{region}", sum(row["status"] != "ok" for row in rows)),
                    scores,
                    _difference(rows, other, f"{run.label}/{region}", bootstrap, seed) if other else None,
                )
            )
    return table


def rows_of(run: Run, region: str) -> list[Row]:
    """Rows of a region, in the order of the file."""
    return [row for row in run.rows if row["region"] == region]


def cell(row: Row, column: str) -> Number | None:
    """A cell of ``per_case.csv`` as a number, None where it is empty or not there."""
    value = row.number(column)
    return None if value is None else Number(value, f"{row.source}/{row.line}/{column}", row[column])


def count(name: str, value: int) -> Number:
    """A number of cases, named ``derived/`` and `name`."""
    return Number(value, f"derived/{name}", str(value))


def extremes(run: Run, region: str, most: int = 3) -> tuple[list[Row], list[Row]]:
    """The worst and the best cases of a run, without a case in both.

    Returns
    -------
    worst, best : list of Row
        The worst first, the best first; at most `most` each.
    """
    ranked = sorted(rows_of(run, region), key=lambda row: (row.number("dice") or 0.0, row["case_id"]))
    n_worst = min(most, (len(ranked) + 1) // 2)
    n_best = min(most, len(ranked) - n_worst)
    return ranked[:n_worst], ranked[len(ranked) - n_best :][::-1]


def _difference(rows: Sequence[Row], others: Sequence[Row], name: str, bootstrap: int, seed: int) -> Difference | None:
    theirs = {row["case_id"]: row.number("dice") or 0.0 for row in others}
    paired = [row for row in rows if row["case_id"] in theirs]
    if not paired:
        return None
    gaps = [(row.number("dice") or 0.0) - theirs[row["case_id"]] for row in paired]
    interval = _interval(gaps, [row["patient_id"] for row in paired], f"dice/{name}", bootstrap, seed, "difference_")
    won = count(f"won/dice/{name}", sum(gap > 0 for gap in gaps))
    return Difference(interval, won, count(f"pairs/dice/{name}", len(gaps)))


def _interval(
    values: Sequence[float], patients: Sequence[str], name: str, bootstrap: int, seed: int, prefix: str = ""
) -> Interval:
    mean, low, high = (
        Number(value, f"derived/{prefix}{statistic}/{name}", repr(value))
        for statistic, value in zip(
            ("mean", "low", "high"), bootstrap_mean(values, patients, bootstrap, seed), strict=True
        )
    )
    return Interval(mean, low, high)
