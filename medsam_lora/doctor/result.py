"""What a check says: a status, what was measured, and for a fault its meaning in plain words and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "FAULT", "skipped"]


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Parameters
    ----------
    status : {"ok", "FAULT", "skipped"}
    measured : str
        With numbers; empty where nothing could be measured.
    meaning : str
        Of a fault its cause, of a skipped check why it was; otherwise empty.
    remedy : str
        An imperative sentence: of a fault, and of a skipped check that could have been decided. One that does not apply
        to the set-up has none.
    numbers : dict
        What was measured as plain data, for programs.
    """

    status: Status
    measured: str = ""
    meaning: str = ""
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def row(self, check: str) -> dict[str, Any]:
        """The result as plain data with stable keys: check, status, measured, meaning, remedy, numbers."""
        return {"check": check, **vars(self)}


def ok(measured: str, **numbers: Any) -> Result:
    """Nothing is wrong."""
    return Result("ok", measured, numbers=numbers)


def fault(measured: str, meaning: str, remedy: str, **numbers: Any) -> Result:
    """Something is wrong; see `Result`."""
    return Result("FAULT", measured, meaning, remedy, numbers)


def skipped(why: str, measured: str = "", remedy: str = "", **numbers: Any) -> Result:
    """The check does not apply, or, with a remedy, could not be decided; see `Result`."""
    return Result("skipped", measured, why, remedy, numbers)


def conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all rows of `Result.row` come to: the faults, and what was not decided.

    Examples
    --------
    >>> rows = [ok("").row("box"), skipped("not at its end", remedy="Give more --steps.").row("overfit")]
    >>> print(conclusion(rows))
    no fault found; not decided: overfit
    >>> print(conclusion([skipped("the method trains nothing").row("moved"), fault("", "", "Do.").row("loss")]))
    faults: loss
    """
    found = [row["check"] for row in rows if row["status"] == "FAULT"]
    undecided = [row["check"] for row in rows if row["status"] == "skipped" and row["remedy"]]
    said = f"faults: {', '.join(found)}" if found else "no fault found"
    return said + (f"; not decided: {', '.join(undecided)}" if undecided else "")


def line(row: dict[str, Any]) -> str:
    """A row of `Result.row` on one line for people.

    Examples
    --------
    >>> print(line(fault("Dice 0.02", "The box is elsewhere.", "Swap the axes.").row("box")))
    FAULT    box       Dice 0.02: The box is elsewhere. Remedy: Swap the axes.
    >>> print(line(skipped("the method cannot be merged").row("merge")))
    skipped  merge     the method cannot be merged
    """
    parts = [part for part in (row["measured"], row["meaning"]) if part]
    text = ": ".join(parts) + (f" Remedy: {row['remedy']}" if row["remedy"] else "")
    return f"{row['status']:<9}{row['check']:<10}{text}"
