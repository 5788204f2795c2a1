"""What runs cost, and what seeds change, as tables of the comparison's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medsam_lora.analysis.comparison_text import table
from medsam_lora.analysis.costs import COSTS
from medsam_lora.analysis.wording import SCORES, method_name

_HEADS = ("trained parameters", "peak memory (MiB)", "training (s)", "s per step")
_READING = (
    "Time is that of the epochs, without validation, and memory the peak of the process while it trained (of the GPU, "
    "where there is one): both are of the machine, and of what else it did. With folds, of one training."
)
_SEEDS_READING = (
    "The interval is over patients, of the mean over seeds: how much cases vary. The standard deviation, lowest and "
    "highest are over seeds, of the mean over cases: how much training varies. They answer different questions."
)


def cost_lines(runs: Sequence[Mapping[str, Any]], seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown of the costs, empty where none is known, and of the seeds, where there are several.

    Parameters
    ----------
    runs : sequence of mapping
        Of ``runs.csv``.
    seeds : sequence of mapping
        Of ``seeds.csv``.
    """
    lines: list[str] = []
    known = [row for row in runs if any(row[name] is not None for name in COSTS)]
    if known:
        head = ("region", "method", "Dice", "95 % interval", *_HEADS)
        body = [(row["region"], method_name(row["method"]), *_dice(row), *_costs(row)) for row in known]
        lines += ["## What the runs cost", "", *table(head, body, "region method"), "", _READING, ""]
    if seeds:
        head = ("region", "method", "seeds", "Dice", "95 % interval", "sd of seeds", "lowest", "highest")
        number = SCORES["dice"].number
        body = [
            (
                *(row["region"], method_name(row["method"]), str(row["n_seeds"]), *_dice(row)),
                *(number(row[name]) for name in ("seed_sd", "seed_low", "seed_high")),
            )
            for row in seeds
        ]
        lines += ["## Seeds", "", *table(head, body, "region method"), "", _SEEDS_READING, ""]
    return lines


def _dice(row: Mapping[str, Any]) -> tuple[str, str]:
    number = SCORES["dice"].number
    return number(row["dice_mean"]), f"{number(row['dice_low'])} to {number(row['dice_high'])}"


def _costs(row: Mapping[str, Any]) -> tuple[str, ...]:
    parameters, memory, seconds, step = (row[name] for name in COSTS)
    return (
        "" if parameters is None else f"{parameters:,.0f}",
        "" if memory is None else f"{memory:,.0f}",
        "" if seconds is None else f"{seconds:,.1f}",
        "" if step is None else f"{step:.3g}",
    )
