"""Entries, refusals and paired rows, from tables written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsam_lora.analysis.comparison import (
    BETTER,
    FLOOR,
    IDENTICAL,
    METHODS,
    NOT_CONFIRMED,
    NOT_SHOWN,
    WORSE,
    check_comparable,
    choose_scores,
    compare_pairs,
    pairs_of,
    per_patient,
)
from medsam_lora.analysis.comparison_text import sentence
from medsam_lora.analysis.entries import Entry, gather
from medsam_lora.analysis.wording import SCORES
from medsam_lora.errors import ConfigError, DataError

DICE = [SCORES["dice"]]


def row(case: str, dice: float, **changes: Any) -> dict[str, str]:
    """A row as read from a table; the patient is the case without its time point."""
    cells = {
        "case_id": case, "patient_id": case.partition("-")[0], "run": "lora", "method": "lora", "region": "WT",
        "dice": dice, "reference_volume_ml": 10.0, "prediction_volume_ml": 9.0, "prompt_source": "reference_box",
        "status": "ok", "postprocess": "none",
    }  # fmt: skip
    return {key: str(value) for key, value in (cells | changes).items()}


def entry(label: str, rows: list[dict[str, str]], is_floor: bool = False) -> Entry:
    return Entry(label, label, Path(label) / "per_case.csv", tuple(rows), is_floor)


def pair(mine: list[dict[str, str]], theirs: list[dict[str, str]], score: str = "dice", **options: int) -> dict:
    entries = [entry("zero_shot", theirs), entry("lora", mine)]
    (result,) = compare_pairs(pairs_of(entries), [SCORES[score]], **options)
    return result


def cohort(values: dict[str, float], **changes: Any) -> list[dict[str, str]]:
    return [row(case, value, **changes) for case, value in values.items()]


EIGHT = {f"p{i}-0": 0.5 + i / 100 for i in range(8)}


def test_every_number_of_a_row_by_hand():
    theirs = {"a-0": 0.5, "a-1": 0.6, "b-0": 0.7, "c-0": 0.8}
    gaps = {"a-0": 0.2, "a-1": 0.0, "b-0": 0.2, "c-0": -0.05}
    mine = [row(case, theirs[case] + gap) for case, gap in gaps.items()]
    mine[3]["status"] = "missing"
    result = pair(mine, cohort(theirs))
    # Per patient: a 0.1, b 0.2, c -0.05. Ranks 2, 3 and 1: smaller sum 1, patterns {} and {1} and mirrors: 4 of 8.
    expected = {
        "family": METHODS, "metric": "dice", "better": "higher", "region": "WT", "method": "lora",
        "baseline": "zero_shot", "n_cases": 4, "n_patients": 3, "n_failed": 1, "baseline_n_failed": 0,
        "wins": 2, "ties": 1, "losses": 1, "verdict": NOT_SHOWN,
    }  # fmt: skip
    assert {key: result[key] for key in expected} == expected
    assert result["mean"] == pytest.approx((0.7 + 0.6 + 0.9 + 0.75) / 4)
    assert result["baseline_median"] == pytest.approx(0.65)
    assert result["mean_difference"] == pytest.approx(0.35 / 4)
    assert result["median_difference"] == pytest.approx(0.1)
    assert (result["wilcoxon_statistic"], result["p_value"], result["p_holm"]) == (1.0, 0.5, 0.5)
    assert result["rank_biserial"] == pytest.approx(4 / 6)
    assert result["cohens_dz"] == pytest.approx(0.25 / 3 / np.std([0.1, 0.2, -0.05], ddof=1))


def test_cases_are_paired_by_name_not_by_place():
    result = pair(cohort({"b-0": 0.9, "a-0": 0.5}), cohort({"a-0": 0.4, "b-0": 0.8}))
    assert result["mean_difference"] == pytest.approx(0.1)
    assert (result["wins"], result["cohens_dz"]) == (2, None)


def test_the_bootstrap_resamples_patients_and_the_test_counts_them():
    # One patient with twelve good cases, three patients with one bad case each: over cases the gain looks certain.
    gaps = {f"a-{i}": 0.3 for i in range(12)} | {"b-0": -0.1, "c-0": -0.12, "d-0": -0.11}
    result = pair(cohort({c: 0.5 + g for c, g in gaps.items()}), cohort(dict.fromkeys(gaps, 0.5)))
    values = np.array(list(gaps.values()))
    drawn = np.random.default_rng(0).choice(values, size=(4000, values.size)).mean(axis=1)
    assert np.quantile(drawn, 0.025) > 0
    # Without patient a, drawn with chance (3/4)^4 = 32 %, every difference is negative.
    # With it, three of four draws or more give the upper end: (36 * 0.3 - 0.11) / 37 = 0.289.
    assert result["difference_low"] < -0.1 and result["difference_high"] == pytest.approx(0.289, abs=0.001)
    assert (result["n_patients"], result["p_value"]) == (4, pytest.approx(14 / 16))
    assert result["verdict"] == NOT_SHOWN


def test_seed_and_resamples_reach_the_bootstrap():
    mine = cohort({case: value + 0.1 * (i % 3) for i, (case, value) in enumerate(EIGHT.items())})
    lows = [pair(mine, cohort(EIGHT), seed=seed, n=50)["difference_low"] for seed in (0, 0, 1)]
    assert lows[0] == lows[1] != lows[2]


def test_lower_is_better_for_distances():
    theirs = cohort(dict.fromkeys(EIGHT, 0.5), hd95_mm=4.0)
    mine = [r | {"hd95_mm": str(3.0 - i / 10)} for i, r in enumerate(theirs)]
    result = pair(mine, theirs, "hd95_mm")
    assert (result["wins"], result["losses"], result["better"], result["verdict"]) == (8, 0, "lower", BETTER)
    assert result["mean_difference"] < 0 and result["rank_biserial"] == -1.0
    assert sentence(result).startswith("LoRA beats zero-shot by 1.35 mm HD95 (95 % 1.")
    assert "lower in 8 of 8 cases, p = 0.0078" in sentence(result)
    back = pair(theirs, mine, "hd95_mm")
    assert (back["wins"], back["losses"], back["verdict"]) == (0, 8, WORSE)
    assert sentence(back).startswith("LoRA is worse than zero-shot by 1.35 mm HD95")


def test_the_difference_of_volume_is_best_at_0():
    theirs = cohort(dict.fromkeys(EIGHT, 0.5), volume_difference_ml=-3.0)
    mine = cohort(dict.fromkeys(EIGHT, 0.5), volume_difference_ml=1.0)
    result = pair(mine, theirs, "volume_difference_ml")
    assert (result["mean"], result["baseline_mean"], result["wins"]) == (1.0, 3.0, 8)


def test_verdicts_and_sentences_claim_no_more_than_they_may():
    shift = {case: value + 0.1 + i / 1000 for i, (case, value) in enumerate(EIGHT.items())}
    assert pair(cohort(shift), cohort(EIGHT))["verdict"] == BETTER
    same = pair(cohort(EIGHT), cohort(EIGHT))
    assert (same["verdict"], same["p_value"]) == (IDENTICAL, 1.0)
    assert sentence(same) == "LoRA and zero-shot have the same Dice in all 8 cases."
    few = pair(cohort(dict(list(shift.items())[:3])), cohort(dict(list(EIGHT.items())[:3])))
    # The interval leaves out 0, but three patients cannot give a p below 2 / 2^3.
    assert few["difference_low"] > 0 and few["verdict"] == NOT_CONFIRMED
    assert sentence(few).startswith("Not confirmed: ") and sentence(few).endswith(
        "; 3 patients cannot give less than 0.25."
    )
    # Eight patients of one sign are enough for six comparisons, not for seven.
    many = few | {"n_patients": 8, "n_comparisons": 7, "p_value": 2 / 2**8, "p_holm": 7 * 2 / 2**8}
    assert sentence(many).endswith("(Holm 0.055); 8 patients and 7 comparisons cannot give less than 0.055.")
    assert sentence(many | {"n_comparisons": 6, "p_holm": 0.06}).endswith("but p = 0.0078 (Holm 0.06).")
    one = pair(cohort({"a-0": 0.9, "a-1": 0.8}), cohort({"a-0": 0.5, "a-1": 0.5}))
    assert (one["difference_low"], one["difference_high"], one["verdict"]) == (None, None, NOT_CONFIRMED)
    assert sentence(one).endswith("one patient cannot tell.")
    mixed = {case: value + (0.1 if i % 2 else -0.1) for i, (case, value) in enumerate(EIGHT.items())}
    assert sentence(pair(cohort(mixed), cohort(EIGHT))).startswith("No difference shown between LoRA and zero-shot")


def test_holm_is_over_a_family_and_metric():
    regions = ("WT", "TC")
    entries = [
        entry(label, [row(case, value + gain, region=region) for region in regions for case, value in EIGHT.items()])
        for label, gain in (("zero_shot", 0.0), ("lora", 0.1), ("full", 0.2))
    ]
    floor = entry("filled_box", [row(case, value - 0.1) for case, value in EIGHT.items()], is_floor=True)
    rows = compare_pairs(pairs_of([*entries, floor]), DICE)
    methods = [r for r in rows if r["family"] == METHODS]
    against_floor = [r for r in rows if r["family"] == FLOOR]
    # Two methods in two regions, three methods in the one region that the floor has; every p is 2 / 2^8.
    assert [(r["method"], r["region"]) for r in methods] == [
        ("lora", "WT"), ("lora", "TC"), ("full", "WT"), ("full", "TC")
    ]  # fmt: skip
    assert [(r["method"], r["region"]) for r in against_floor] == [("zero_shot", "WT"), ("lora", "WT"), ("full", "WT")]
    assert {r["p_value"] for r in rows} == {2 / 2**8}
    assert {r["n_comparisons"] for r in methods} == {4} and {r["n_comparisons"] for r in against_floor} == {3}
    assert {r["p_holm"] for r in methods} == {4 * 2 / 2**8} and {r["p_holm"] for r in against_floor} == {3 * 2 / 2**8}
    assert [(m.label, b.label) for _, m, b in pairs_of(entries, all_pairs=True)] == [
        ("lora", "zero_shot"), ("full", "zero_shot"), ("full", "lora")
    ]  # fmt: skip
    assert [(m.label, b.label) for _, m, b in pairs_of([floor, *entries])] == [
        (e.label, "filled_box") for e in entries
    ]  # fmt: skip


def test_patients_are_averaged():
    mine = entry("lora", [row("a-0", 0.4), row("a-1", 0.8, status="missing"), row("b-0", 0.5)])
    first, second = per_patient([mine], DICE)
    assert (first["patient_id"], first["n_cases"], first["n_failed"], first["dice"]) == ("a", 2, 1, pytest.approx(0.6))
    assert (second["patient_id"], second["dice"]) == ("b", 0.5)


BASE = [row("a-0", 0.5), row("b-0", 0.6)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([BASE[0], row("c-0", 0.6)], ["case lists differ for WT", "1 only in zero_shot (b-0)", "1 only in lora (c-0)"]),
        ([BASE[0], BASE[1] | {"prompt_source": "box_table"}], ["prompt sources differ for b-0", "'box_table' in lora"]),
        ([BASE[0], BASE[1] | {"patient_id": "x"}], ["patients differ for b-0", "'b' in zero_shot, 'x' in lora"]),
        ([BASE[0], BASE[1] | {"reference_volume_ml": "11"}], ["references differ for b-0", "10.000 ml", "11.000 ml"]),
        ([r | {"region": "TC"} for r in BASE], ["regions differ", "zero_shot has WT, lora has TC"]),
    ],
)
def test_runs_that_were_not_scored_alike_are_refused(changed: list[dict[str, str]], words: list[str]):
    with pytest.raises(DataError) as refusal:
        check_comparable([entry("zero_shot", BASE), entry("lora", changed)], DICE)
    assert [word for word in words if word not in str(refusal.value)] == []
    assert "lora/per_case.csv" in str(refusal.value) and refusal.value.remedy


def test_another_challenge_is_refused_where_it_defines_the_metric():
    ours, theirs = (
        [r | {"hd95_mm": "1", "challenge": name} for r in BASE] for name in ("brats2023-gli", "brats2023-men")
    )
    entries = [entry("zero_shot", ours), entry("lora", theirs)]
    with pytest.raises(DataError, match="zero_shot was scored as brats2023-gli, lora as brats2023-men"):
        check_comparable(entries, [SCORES["hd95_mm"]])
    check_comparable(entries, DICE)
    with pytest.raises(ConfigError, match="metric definitions differ: lora has no column hd95_mm"):
        choose_scores([entries[0], entry("lora", BASE)], ["hd95_mm"])


def test_post_processing_may_differ_and_the_floor_may_lack_regions():
    both = [*BASE, *(r | {"region": "TC"} for r in BASE)]
    cleaned = [r | {"postprocess": "largest"} for r in both]
    floor = entry("filled_box", BASE, is_floor=True)
    check_comparable([entry("zero_shot", both), entry("lora", cleaned), floor], DICE)
    (*_, last) = compare_pairs(pairs_of([entry("zero_shot", both), entry("lora", cleaned)]), DICE)
    assert (last["postprocess"], last["baseline_postprocess"]) == ("largest", "none")


def test_the_scores_of_a_challenge_are_chosen_where_all_have_them():
    full = [r | {"hd95_mm": "1", "lesionwise_dice": "1", "challenge": "brats2023-gli"} for r in BASE]
    assert [s.column for s in choose_scores([entry("a", full)], None)] == ["dice", "lesionwise_dice", "hd95_mm"]
    assert [s.column for s in choose_scores([entry("a", full), entry("b", BASE)], None)] == ["dice"]
    with pytest.raises(ConfigError, match=r"dcie is no score.*Did you mean dice\?"):
        choose_scores([entry("a", BASE)], ["dcie"])
    with pytest.raises(ConfigError, match="reference_volume_ml is no score"):
        choose_scores([entry("a", BASE)], ["reference_volume_ml"])


@pytest.mark.parametrize("cell", ["", "nan", "much"])
def test_a_score_that_is_no_number_names_its_case(cell: str):
    with pytest.raises(DataError, match=r"case b-0: lora/per_case\.csv: WT of lora has no dice"):
        pair([BASE[0], BASE[1] | {"dice": cell}], BASE)


def labels(*tables: tuple[str, list[dict[str, str]]]) -> list[tuple[str, bool]]:
    return [(e.label, e.is_floor) for e in gather([(Path(p), rows) for p, rows in tables], "filled_box")]


def test_runs_of_one_method_are_told_apart():
    named = [[r | {"run": f"lora_r{rank}/fold{i}"} for i, r in enumerate(BASE)] for rank in (4, 8)]
    assert labels(("x.csv", named[0]), ("y.csv", named[1])) == [("lora_r4", False), ("lora_r8", False)]
    assert labels(("/o/a/runs/lora/t.csv", BASE), ("/o/b/runs/lora/t.csv", BASE)) == [
        ("lora (a)", False), ("lora (b)", False)
    ]  # fmt: skip
    # What a reader sees is told apart as well: lora is shown as LoRA.
    assert labels(("x.csv", BASE), ("y.csv", [r | {"method": "LoRA"} for r in BASE])) == [
        ("lora #1", False), ("LoRA #2", False)
    ]  # fmt: skip
    # One table of both.
    assert labels(("x.csv", named[0] + named[1])) == [("lora_r4", False), ("lora_r8", False)]
    with pytest.raises(DataError, match=r"case a-0: .*lora has two rows of WT"):
        labels(("x.csv", BASE + BASE))


def test_equal_floors_are_one_and_other_boxes_are_refused():
    floor = [r | {"method": "filled_box"} for r in BASE]
    lost = floor[0] | {"status": "missing", "dice": "0", "prediction_volume_ml": ""}
    first, second = BASE + floor, [r | {"method": "full"} for r in BASE] + [lost, floor[1]]
    for tables in ((first, second), (second, first)):
        entries = gather([(Path(str(i)), t) for i, t in enumerate(tables)], "filled_box")
        assert [e.is_floor for e in entries] == [False, False, True]
        # A case that one run lost has its boxes from the other.
        assert [r["status"] for r in entries[-1].rows] == ["ok", "ok"]
    wider = [floor[0], floor[1] | {"prediction_volume_ml": "12.5"}]
    with pytest.raises(DataError, match=r"case b-0: .*the boxes differ.*9.000 ml and 12.500 ml"):
        labels(("x.csv", BASE + floor), ("y.csv", wider))
