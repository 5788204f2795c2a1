"""A comparison in words: one sentence per pair, and the Markdown page with its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsam_lora.analysis.comparison import BETTER, FLOOR, IDENTICAL, LEVEL, METHODS, NOT_SHOWN, WORSE
from medsam_lora.analysis.entries import Entry, failed
from medsam_lora.analysis.paired import smallest_p
from medsam_lora.analysis.wording import SCORES, Score, method_name, region_name

_HEADINGS = {METHODS: "Methods against each other", FLOOR: "Methods against the floor"}
_FLOOR_NOTE = (
    "The floor is every prompt box filled, without looking at the image: a method that does not beat it adds nothing "
    "to its prompt."
)


@dataclass(frozen=True)
class Picture:
    """A plot of the page.

    Parameters
    ----------
    name : str
        File name without its ending.
    caption : str
        What it shows and how to read it.
    """

    name: str
    caption: str


def sentence(row: Mapping[str, Any]) -> str:
    """One comparison in plain words, claiming no more than interval and test allow.

    Parameters
    ----------
    row : mapping
        Of ``statistics.csv``.

    Examples
    --------
    >>> row = {"metric": "dice", "region": "WT", "method": "lora", "baseline": "zero_shot", "verdict": "better"}
    >>> row |= {"mean_difference": 0.064, "difference_low": 0.039, "difference_high": 0.093, "wins": 8, "losses": 0}
    >>> row |= {"n_cases": 8, "n_patients": 8, "p_value": 0.0078125, "p_holm": 0.015625, "n_comparisons": 2}
    >>> print(sentence(row))
    LoRA beats zero-shot by 0.064 Dice (95 % 0.039 to 0.093), higher in 8 of 8 cases, p = 0.0078 (Holm 0.016).
    """
    score = SCORES[row["metric"]]
    method, baseline = method_name(row["method"]), method_name(row["baseline"])
    gap, low, high = row["mean_difference"], row["difference_low"], row["difference_high"]
    n = row["n_cases"]
    if row["verdict"] == IDENTICAL:
        return f"{method} and {baseline} have the same {score.title} in {_all_cases(n)}."
    tests = f"p {_p(row['p_value'], '= ')} (Holm {_p(row['p_holm'])})"
    if row["verdict"] == NOT_SHOWN:
        spans = f"{score.amount(gap)} on average (95 % {score.number(low)} to {score.number(high)})"
        cases = _share(row["wins"] if score.higher_is_better else row["losses"], n)
        return f"No difference shown between {method} and {baseline}: {spans}, higher in {cases}, {tests}."
    # From here on the sign is in the words.
    way = "higher" if gap > 0 else "lower"
    count = row["wins"] if (gap > 0) == score.higher_is_better else row["losses"]
    span = "" if low is None else f" (95 % {_span(score, low, high)})"
    amount = f"{score.amount(abs(gap))}{span}, {way} in {_share(count, n)}"
    if row["verdict"] in (BETTER, WORSE):
        verb = "beats" if row["verdict"] == BETTER else "is worse than"
        return f"{method} {verb} {baseline} by {amount}, {tests}."
    start = f"Not confirmed: {method} is {way} than {baseline} by {amount}"
    if row["n_patients"] == 1:
        return f"{start}; one patient cannot tell."
    least = _least(row)
    if least <= LEVEL:
        return f"{start}, but {tests}."
    m = row["n_comparisons"]
    compared = f" and {m} comparisons" if m > 1 else ""
    return f"{start}, but {tests}; {row['n_patients']} patients{compared} cannot give less than {least:.2g}."


def _least(row: Mapping[str, Any]) -> float:
    """The smallest corrected p-value that so many patients and comparisons allow: m times the smallest p."""
    return min(1.0, row["n_comparisons"] * smallest_p(row["n_patients"]))


def _span(score: Score, low: float, high: float) -> str:
    if low < 0 and high <= 0:
        low, high = -high, -low
    return f"{score.number(low)} to {score.number(high)}"


def _share(count: int, n: int) -> str:
    return f"{count} of {n} case{'' if n == 1 else 's'}"


def _all_cases(n: int) -> str:
    return "the one case" if n == 1 else f"all {n} cases"


def _p(value: float, equals: str = "") -> str:
    return "< 0.001" if value < 0.001 else f"{equals}{value:.2g}"


def page(
    entries: Sequence[Entry],
    scores: Sequence[Score],
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[Picture] = (),
    notes: Sequence[str] = (),
    costs: Sequence[str] = (),
) -> str:
    """The whole comparison as Markdown.

    Parameters
    ----------
    entries : sequence of Entry
        The baseline first.
    scores : sequence of Score
    rows : sequence of mapping
        Of ``statistics.csv``.
    pictures : sequence of Picture
        Their SVG files stand beside the page.
    notes : sequence of str
        What the reader should know of this comparison: differing settings, plots that could not be drawn.
    costs : sequence of str
        Lines of Markdown (`cost_text.cost_lines`).
    """
    lines = ["# Comparison", "", *_about(entries), ""]
    for score in scores:
        lines += [f"## {capital(score.title)}", "", _direction(score), "", *_means(entries, score), ""]
        for region in dict.fromkeys(row["region"] for row in rows):
            mine = [row for row in rows if row["region"] == region and row["metric"] == score.column]
            lines += [f"{capital(region_name(region))}:", "", *(f"- {sentence(row)}" for row in mine), ""]
        for family in dict.fromkeys(row["family"] for row in rows):
            block = [row for row in rows if row["family"] == family and row["metric"] == score.column]
            lines += [f"### {_HEADINGS[family]}", "", *([_FLOOR_NOTE, ""] if family == FLOOR else [])]
            tests = "the one comparison" if len(block) == 1 else f"the {len(block)} comparisons"
            least = min(map(_least, block))
            bound = f" So few patients cannot give a corrected p below {least:.2g}." if least > LEVEL else ""
            lines += [*_differences(block, score), "", f"Holm's correction is over {tests} of this table.{bound}", ""]
    lines += costs
    if pictures:
        lines += ["## Pictures", ""]
        for picture in pictures:
            lines += [f"![{picture.caption}]({picture.name}.svg)", "", picture.caption, ""]
    lines += ["## How to read this", "", *_explanation(rows)]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _about(entries: Sequence[Entry]) -> list[str]:
    first = entries[0]
    cases = {row["case_id"] for row in first.rows}
    patients = {row["patient_id"] for row in first.rows}
    names = ", ".join(method_name(entry.label) for entry in entries)
    about = (
        f"{names}: {len(cases)} case{'s' * (len(cases) != 1)} of {len(patients)} patient{'s' * (len(patients) != 1)}, "
    )
    about += f"prompts: {first.values_of('prompt_source')}"
    if first.has("challenge"):
        about += f", scores of {first.values_of('challenge')}"
    return [about + f". The baseline is {method_name(first.label)}."]


def _direction(score: Score) -> str:
    return f"In {score.unit}; {score.better} is better." if score.unit else f"{capital(score.better)} is better."


def _means(entries: Sequence[Entry], score: Score) -> list[str]:
    head = ("region", "method", "mean", "median", "cases", "failed", "post-processing")
    body = []
    for region in dict.fromkeys(region for entry in entries for region in entry.regions):
        for entry in entries:
            rows = list(entry.of(region).values())
            if rows:
                values = [entry.number(row, score) for row in rows]
                numbers = (score.number(float(np.mean(values))), score.number(float(np.median(values))))
                counts = (str(len(rows)), str(sum(map(failed, rows))))
                body.append((region, method_name(entry.label), *numbers, *counts, entry.values_of("postprocess")))
    return table(head, body, "region method post-processing")


def _differences(rows: Sequence[Mapping[str, Any]], score: Score) -> list[str]:
    head = (
        *("region", "method", "baseline", "mean difference", "95 % interval", "median difference"),
        *("better / equal / worse", "p", "p (Holm)", "rank-biserial", "Cohen's d_z", "verdict"),
    )
    body = []
    for row in rows:
        low, high = row["difference_low"], row["difference_high"]
        body.append(
            (
                row["region"],
                method_name(row["method"]),
                method_name(row["baseline"]),
                _signed(score, row["mean_difference"]),
                "" if low is None else f"{_signed(score, low)} to {_signed(score, high)}",
                _signed(score, row["median_difference"]),
                f"{row['wins']} / {row['ties']} / {row['losses']}",
                _p(row["p_value"]),
                _p(row["p_holm"]),
                f"{row['rank_biserial']:+.2f}",
                "" if row["cohens_dz"] is None else f"{row['cohens_dz']:+.2f}",
                row["verdict"],
            )
        )
    return table(head, body, "region method baseline verdict")


def _explanation(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    n = max(row["n_patients"] for row in rows)
    least = smallest_p(n)
    lines = [
        "- A difference is method minus baseline, paired by case. Its mean, median and better / equal / worse are over "
        "cases; a failed prediction counts with the worst score.",
        "- The 95 % interval is a percentile bootstrap that resamples patients, not cases. Of a handful of patients "
        "it is too narrow, which is why the test has to agree before a difference is called one.",
        "- p is Wilcoxon's signed-rank test, two-sided, on one mean difference per patient; so are the effect sizes. "
        f"With {n} patient{'s' * (n != 1)} the smallest p possible is "
        + (f"2 / 2^{n} = {least:.2g}." if n <= 20 else "far below any level used here."),
        "- Rank-biserial: +1 where every patient's difference is positive, -1 where each is negative. Cohen's d_z: "
        "the mean difference in standard deviations of the differences; empty where they do not vary.",
        f"- *better* and *worse* need both an interval that leaves out 0 and a corrected p of at most {LEVEL:g}. "
        "*not confirmed*: the interval leaves out 0, the test does not agree. *no difference shown* is not proof of "
        "equality.",
    ]
    return lines


def _signed(score: Score, value: float) -> str:
    text = score.number(value)
    return text if text.startswith("-") or not float(text) else f"+{text}"


def table(head: Sequence[str], body: Sequence[Sequence[str]], words: str) -> list[str]:
    """A Markdown table; the columns named in `words` hold words, the others numbers."""
    marks = ["---" if name in words.split() else "---:" for name in head]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (head, marks, *body)]


def capital(text: str) -> str:
    """Text with a capital letter in front; what follows is left as it is."""
    return text[:1].upper() + text[1:]
