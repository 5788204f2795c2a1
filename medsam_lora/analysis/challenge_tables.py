"""``all_scores.csv`` and ``all_full_scores.csv``: per-case rows in the shape of the BraTS leaderboards.

One line per case with the regions side by side, then mean, standard deviation and quartiles over the cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

LESION_SCORES: Final[Mapping[str, str]] = {
    "LesionWise_Dice": "lesionwise_dice",
    "LesionWise_Hausdorff95": "lesionwise_hd95_mm",
    "Num_TP": "lesions_tp",
    "Num_FP": "lesions_fp",
    "Num_FN": "lesions_fn",
}
"""Columns of ``all_scores.csv``, before the region, and the column of ``per_case.csv`` each is."""

FULL_SCORES: Final[Mapping[str, str]] = {
    "Dice": "legacy_dice",
    "Hausdorff95": "legacy_hd95_mm",
    "Sensitivity": "sensitivity",
    "Specificity": "specificity",
}
"""Columns of ``all_full_scores.csv``, likewise."""

CASE: Final = "scan_id"


def challenge_table(
    rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Turn rows of one method into a leaderboard table.

    Parameters
    ----------
    rows : iterable of mapping
        Of ``per_case.csv`` with the columns of a challenge, one per case and region.
    names : mapping of str to str
        `LESION_SCORES` or `FULL_SCORES`.

    Returns
    -------
    columns : list of str
        The case, then every name with every region, in alphabetical order of the regions.
    lines : list of dict
        The cases by id, then ``mean``, ``std`` (of a sample; None for one case), ``25quantile``, ``median`` and
        ``75quantile``. A region that a case was not scored on is None, and left out of these five.

    Examples
    --------
    >>> def row(case, dice):
    ...     return {"case_id": case, "region": "WT", "legacy_dice": dice}
    >>> columns, lines = challenge_table([row("b", 0.5), row("a", 1.0)], {"Dice": "legacy_dice"})
    >>> columns, [line["scan_id"] for line in lines][:3], lines[2]["Dice_WT"]
    (['scan_id', 'Dice_WT'], ['a', 'b', 'mean'], 0.75)
    """
    cases: dict[str, dict[str, Any]] = {}
    regions = set()
    for row in rows:
        regions.add(row["region"])
        cases.setdefault(row["case_id"], {}).update({f"{n}_{row['region']}": row[key] for n, key in names.items()})
    columns = [f"{name}_{region}" for name in names for region in sorted(regions)]
    lines = [{CASE: case, **{column: cases[case].get(column) for column in columns}} for case in sorted(cases)]
    summary = {column: _describe([line[column] for line in lines if line[column] is not None]) for column in columns}
    lines += [{CASE: name, **{column: summary[column][name] for column in columns}} for name in _describe([0.0])]
    return [CASE, *columns], lines


def _describe(values: Sequence[Any]) -> dict[str, float | None]:
    low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "25quantile": low,
        "median": median,
        "75quantile": high,
    }
