"""The run record of the page: what the stages wrote down of themselves, put side by side."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam_lora.io.files import sha256_of
from medsam_lora.report.collect import Record, Run
from medsam_lora.report.scores import Number


@dataclass(frozen=True)
class Fact:
    """A line of a run record.

    Parameters
    ----------
    name : str
    values : tuple of (str, str or Number)
        Fold (empty where there are none, or all folds say the same) and value.
    unit : str
    code : bool
        Whether the value is set as code (commands, hashes).
    """

    name: str
    values: tuple[tuple[str, str | Number], ...]
    unit: str = ""
    code: bool = False


Finder = Callable[[Mapping[str, Any]], Any]


def facts(run: Run, keys: Mapping[Path, str], manifests: Sequence[Path]) -> list[Fact]:
    """The record of one run.

    Parameters
    ----------
    run : Run
    keys : mapping of Path to str
        Short name of every record file, for the numbers taken from it.
    manifests : sequence of Path
        Where the cases are listed.
    """
    training, prediction = run.training, run.prediction
    sources = ", ".join(dict.fromkeys(row["prompt_source"] for row in run.rows))
    cleaned = ", ".join(dict.fromkeys(row.cells.get("postprocess") or "none" for row in run.rows))
    lines = [
        _fact("Command (training)", training, lambda d: _command(d.get("command")), code=True),
        _fact("Command (prediction)", prediction, lambda d: _command(d.get("command")), code=True),
        _fact("Trained at", training, lambda d: d.get("written_at")),
        _fact("Predicted at", prediction, lambda d: d.get("written_at")),
        Fact("Prompt source", (("", sources),)),
        Fact("Post-processing", (("", cleaned),)),
        _fact("Method and its options", prediction or training, _options),
        _number("Trained parameters", training, "trainable_parameters", keys),
        _number("Training cases", training, "n_train_cases", keys),
        _number("Validation cases", training, "n_val_cases", keys),
        _fact("Seeds", training, _seeds),
        _fact("Device", training or prediction, lambda d: _joined(d.get("device"), d.get("amp"))),
        _number("Training time", training, "duration_s", keys, "s"),
        _number("Prediction time", prediction, "duration_s", keys, "s"),
        _number("Peak memory, training", training, "peak_memory_mib", keys, "MiB"),
        _number("Peak memory, prediction", prediction, "peak_memory_mib", keys, "MiB"),
        _fact("Base weights, sha256", prediction or training, lambda d: d.get("base_sha256"), code=True),
        _fact("Adapter, sha256", prediction, lambda d: d.get("adapter_sha256"), code=True),
        Fact("Manifest, sha256", tuple((p.name, sha256_of(p)) for p in manifests), code=True),
        _fact("Prepared store", training, lambda d: d.get("store"), code=True),
        _number("Reloaded adapter differs by (Dice)", training, "reload_check/largest_difference", keys),
        _fact("Versions", training or prediction, _versions),
        _fact("Platform", training or prediction, lambda d: _joined(d.get("platform"), d.get("python"))),
    ]
    return [fact for fact in lines if fact is not None and fact.values]


def lookup(data: Mapping[str, Any], path: str) -> Any:
    """A value of nested mappings by its keys, ``a/b``; None where a key is not there.

    Examples
    --------
    >>> lookup({"a": {"b": 1}}, "a/b"), lookup({}, "a/b")
    (1, None)
    """
    value: Any = data
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _fact(name: str, records: Sequence[Record], find: Finder, *, code: bool = False) -> Fact | None:
    values = [(record.part, str(value)) for record in records if (value := find(record.data)) not in (None, "")]
    if len({value for _, value in values}) == 1:
        values = [("", values[0][1])]
    return Fact(name, tuple(values), code=code) if values else None


def _number(name: str, records: Sequence[Record], path: str, keys: Mapping[Path, str], unit: str = "") -> Fact | None:
    found = [(record, lookup(record.data, path)) for record in records]
    values = tuple(
        (record.part, Number(value, f"{keys[record.path]}/{path}", repr(value)))
        for record, value in found
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    return Fact(name, values, unit) if values else None


def _command(words: Any) -> str | None:
    return shlex.join(map(str, words)) if isinstance(words, list) else None


def _options(data: Mapping[str, Any]) -> str | None:
    options = data.get("method_options") or lookup(data, "config/method")
    if not isinstance(options, Mapping):
        return str(data["method"]) if "method" in data else None
    rest = [f"{k} {_plain(v)}" for k, v in options.items() if k != "name" and v is not None]
    return ", ".join([str(options.get("name", data.get("method", ""))), *rest])


def _seeds(data: Mapping[str, Any]) -> str | None:
    named = {
        "training": "config/train/seed",
        "model": "config/model/seed",
        "slices": "config/slicing/seed",
        "bootstrap": "config/evaluate/seed",
    }
    return ", ".join(f"{n} {v}" for n, path in named.items() if (v := lookup(data, path)) is not None)


def _versions(data: Mapping[str, Any]) -> str | None:
    packages = {"medsam-lora": data.get("medsam_lora"), **(data.get("packages") or {})}
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version)


def _joined(first: Any, second: Any) -> str | None:
    return ", ".join(_words(first, second)) or None


def _words(first: Any, second: Any) -> Iterator[str]:
    if first:
        yield str(first)
    if second:
        yield str(second)


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
