"""The leaderboard tables by hand, and their statistics against pandas, which the challenge describes them with."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from medsam_lora.analysis.challenge_tables import FULL_SCORES, LESION_SCORES, challenge_table


def row(case: str, region: str, value: float) -> dict:
    keys = [*LESION_SCORES.values(), *FULL_SCORES.values()]
    return {"case_id": case, "region": region, **{key: value + i for i, key in enumerate(keys)}}


def test_columns_and_lines_as_the_challenge_has_them():
    rows = [row("m-2", r, 2.0) for r in ("WT", "TC", "ET")] + [row("m-1", r, 1.0) for r in ("WT", "TC", "ET")]
    columns, lines = challenge_table(rows, LESION_SCORES)
    names = ("LesionWise_Dice", "LesionWise_Hausdorff95", "Num_TP", "Num_FP", "Num_FN")
    assert columns == ["scan_id", *(f"{name}_{region}" for name in names for region in ("ET", "TC", "WT"))]
    assert [line["scan_id"] for line in lines] == ["m-1", "m-2", "mean", "std", "25quantile", "median", "75quantile"]
    assert [line["LesionWise_Dice_ET"] for line in lines[:3]] == [1.0, 2.0, 1.5]
    assert lines[0]["Num_FN_WT"] == 5.0
    columns, lines = challenge_table(rows, FULL_SCORES)
    assert columns[1::3] == ["Dice_ET", "Hausdorff95_ET", "Sensitivity_ET", "Specificity_ET"]
    assert lines[1]["Specificity_TC"] == 2.0 + 8


def test_statistics_equal_those_of_pandas():
    values = np.random.default_rng(2).random(9)
    _, lines = challenge_table([row(f"c{i}", "WT", v) for i, v in enumerate(values)], FULL_SCORES)
    described = pd.Series(values + 5).describe()
    found = {line["scan_id"]: line["Dice_WT"] for line in lines[9:]}
    for ours, theirs in (
        ("mean", "mean"),
        ("std", "std"),
        ("25quantile", "25%"),
        ("median", "50%"),
        ("75quantile", "75%"),
    ):
        assert found[ours] == pytest.approx(described[theirs])


def test_one_case_has_no_deviation_and_a_region_not_scored_is_left_out():
    _, lines = challenge_table([row("a", "WT", 0.5)], FULL_SCORES)
    assert {line["scan_id"]: line["Dice_WT"] for line in lines}["std"] is None
    _, lines = challenge_table([row("a", "WT", 0.5), row("b", "WT", 1.5), row("b", "ET", 3.5)], FULL_SCORES)
    table = {line["scan_id"]: line for line in lines}
    assert table["a"]["Dice_ET"] is None
    assert table["mean"]["Dice_ET"] == 8.5
    assert table["mean"]["Dice_WT"] == 6.0
