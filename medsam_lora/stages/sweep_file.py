"""What a sweep file says: a pipeline, and the settings that are varied in it, each combination a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from medsam_lora.config import (
    Config,
    Section,
    apply_overrides,
    build_config,
    load_yaml,
    nearest,
    number_aware,
    plain_name,
)
from medsam_lora.errors import ConfigError
from medsam_lora.stages.pipeline import Method, Pipeline, PipelineSection, check_methods, of_file, parse_pipeline
from medsam_lora.stages.point_names import check_names, key_names, labelled, text_of
from medsam_lora.stages.relevance import DECIDING, check_key, reads

# Other regions, other prompts: `compare` refuses to hold such runs against each other.
_SCORED_APART: Final = ("train.regions", "predict.prompts")

Choices = dict[str, Any]
"""The values of a key by the names that they have in the names of points."""


class RangeSection(Section):
    """Numbers between two bounds, both included; whole numbers where both bounds are."""

    low: int | float = Field(description="Smallest value.")
    high: int | float = Field(description="Largest value.")
    log: bool = Field(False, description="Draw the logarithm evenly; of learning rates this is what is wanted.")

    @model_validator(mode="after")
    def _fitting(self) -> RangeSection:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with log: true")
        return self


# A step is no key of a range here, but whoever writes one means a range.
_RANGE_KEYS: Final = {*RangeSection.model_fields, "step"}


class StudySection(Section):
    """A search by optuna for the best validation Dice (extra `sweep`)."""

    trials: int = Field(20, ge=1, description="Trials with a score in all, with those of earlier calls.")
    seed: int = Field(0, ge=0, description="Seed of the sampler.")
    sampler: Literal["tpe", "random"] = Field("tpe", description="How the next point is chosen.")
    keys: dict[str, Any] = Field(
        min_length=1, description="section.key to a list of values, or to {low, high, log} of numbers."
    )


class SweepSection(Section):
    """The keys of a sweep file beside those of the pipeline."""

    pipeline: str | None = Field(
        None, description="Pipeline file, relative to this one; the other keys of this file go over it."
    )
    grid: dict[str, Any] | None = Field(
        None,
        description="section.key to a list of values, or to a mapping of names to values; every combination is run.",
    )
    study: StudySection | None = Field(None, description="Instead of grid: a search for the best validation Dice.")
    score: Literal["val", "test"] | None = Field(
        None, description="Split that is scored; null is test for a grid. A study takes val, never test."
    )

    @field_validator("grid")
    @classmethod
    def _values(cls, grid: dict[str, Any] | None) -> dict[str, Any] | None:
        for key, values in (grid or {}).items():
            if isinstance(values, dict) and {"low", "high"} <= set(values) <= _RANGE_KEYS:
                raise ValueError(f"{key} has a range, which needs study; a grid takes a list of values")
            if not isinstance(values, list | dict) or not values:
                raise ValueError(f"{key} needs a list of values, or a mapping of names to values")
        if grid is not None and not grid:
            raise ValueError("the grid names no key")
        return grid

    @model_validator(mode="after")
    def _one_of_both(self) -> SweepSection:
        if (self.grid is None) == (self.study is None):
            raise ValueError("give either grid or study")
        if self.study is not None and self.score == "test":
            raise ValueError(
                "a study is scored on val: settings that were chosen on test cases cannot be judged on them any more"
            )
        return self


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Parameters
    ----------
    method : Method
        Its label is the name of the point and of its folder.
    values : mapping of str to str
        What it has of the keys that are swept, as in its name; keys that have no say in it are left out.
    """

    method: Method
    values: Mapping[str, str]

    @property
    def label(self) -> str:
        """Name of the point and of its folder."""
        return self.method.label


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Parameters
    ----------
    settings : SweepSection
    pipeline : Pipeline
        With the methods of the file, not yet varied.
    choices : mapping of str to mapping
        Of every key that has a list: name to value.
    ranges : mapping of str to RangeSection
        Of every other key; a study only.
    """

    settings: SweepSection
    pipeline: Pipeline
    choices: Mapping[str, Choices]
    ranges: Mapping[str, RangeSection]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are swept, in the order of the file."""
        study = self.settings.study
        return tuple(self.settings.grid or (study.keys if study is not None else ()))

    @property
    def split(self) -> str:
        """The split that is scored."""
        return self.settings.score or ("test" if self.settings.study is None else "val")


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file whole, with every point of its grid.

    Parameters
    ----------
    path : Path
    overrides : sequence of str
        As of `pipeline.load_pipeline`; also ``study.key=value`` and ``sweep.key=value``.

    Raises
    ------
    ConfigError
        Where a key is unknown or ill-typed, a point's settings are or suit no model, or a study asks for test cases.
    """
    data = load_yaml(path)
    own = {key: number_aware(value) for key, value in data.items() if key in SweepSection.model_fields}
    mine = [text for text in overrides if text.partition(".")[0] in ("sweep", "study")]
    settings = _settings(own, mine, path)
    rest = {key: value for key, value in data.items() if key not in own}
    if settings.pipeline is not None:
        rest = _over(load_yaml(path.parent / settings.pipeline), rest)
    known = {*SweepSection.model_fields, *PipelineSection.model_fields, *Config.model_fields}
    for key in rest:
        if key not in known:
            guess = nearest(key, sorted(known))
            hint = f"; did you mean {guess}?" if guess else ""
            raise ConfigError(f"unknown key {key}{hint}", path=path, remedy="See pipelines/README.md.")
    shared = [text for text in overrides if text not in mine]
    pipeline = parse_pipeline(rest, shared, path)
    study = settings.study
    swept = settings.grid if settings.grid is not None else study.keys if study is not None else {}
    for key in swept:
        with of_file(path):
            check_key(key)
        if key.startswith("evaluate."):
            remedy = "Give it once, in the section evaluate; medsam-lora evaluate scores the points in other ways."
            raise ConfigError(f"{key} is swept, but all points are scored alike", path=path, remedy=remedy)
        if key in _SCORED_APART:
            remedy = "Make a sweep for each of its values; their tables stand side by side."
            raise ConfigError(
                f"{key} is swept, but points that differ in it cannot be compared", path=path, remedy=remedy
            )
        if any(text.partition("=")[0].strip() == key for text in shared):
            raise ConfigError(f"{key} is swept and also set", path=path, remedy=f"Take --set {key}=… away.")
    ranges = {key: _range(key, value, path) for key, value in swept.items() if study is not None and _is_range(value)}
    with of_file(path):
        choices = {key: labelled(key, _plain(key, value)) for key, value in swept.items() if key not in ranges}
        sweep = Sweep(settings, pipeline, choices, ranges)
        points = _checked(sweep, path)
    check_methods([point.method for point in points], path, "point")
    return sweep


def grid_points(sweep: Sweep) -> list[Point]:
    """Every method of the pipeline with every combination of the values that have a say in it, each once.

    A method in which no key has a say, such as zero-shot in a sweep of ranks, is one point under its own label.

    Raises
    ------
    ConfigError
        Where the settings of a point cannot be used.
    """
    points: list[Point] = []
    for method in sweep.pipeline.methods:
        for names in product(*(list(choices) for choices in sweep.choices.values())):
            chosen = dict(zip(sweep.choices, names, strict=True))
            points.append(
                point_of(sweep, method, {key: sweep.choices[key][name] for key, name in chosen.items()}, chosen)
            )
    # Combinations that differ in what has no say are one point.
    return list({point.label: point for point in reversed(points)}.values())[::-1]


def point_of(sweep: Sweep, method: Method, values: Mapping[str, Any], names: Mapping[str, str]) -> Point:
    """A method with some values, as far as they have a say in it.

    Parameters
    ----------
    sweep : Sweep
    method : Method
    values : mapping of str to object
        By key.
    names : mapping of str to str
        What the values are called.
    """
    told = ",".join(f"{key}={name}" for key, name in names.items())
    whole = _with(method.config, values, told)
    read = [key for key in values if reads(whole, key)]
    config = _with(method.config, {key: values[key] for key in read}, told)
    short = key_names(sweep.keys)
    parts = [f"{short[key]}={names[key]}" for key in read]
    if not parts or len(swept_methods(sweep)) > 1:
        parts.insert(0, method.label)
    label = ",".join(parts)
    check_names(label)
    return Point(Method(label, config), {key: names[key] for key in read})


def swept_methods(sweep: Sweep) -> list[Method]:
    """The methods of the pipeline in which some key has a say."""
    return [method for method in sweep.pipeline.methods if any(reads(method.config, key) for key in sweep.keys)]


def with_pipeline(sweep: Sweep, pipeline: Pipeline) -> Sweep:
    """The sweep over another state of its pipeline, such as one with pre-trained weights."""
    return replace(sweep, pipeline=pipeline)


def _settings(own: Mapping[str, Any], overrides: Sequence[str], path: Path) -> SweepSection:
    study = own.get("study")
    merged = apply_overrides(
        {"sweep": {k: v for k, v in own.items() if k != "study"}, "study": study if isinstance(study, dict) else {}},
        overrides,
    )
    data = merged["sweep"] | ({"study": merged["study"]} if study is not None or merged["study"] else {})
    try:
        return SweepSection.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'sweep'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_url=False)
        )
        raise ConfigError(problems, path=path, remedy="See docs/sweep.md.") from error


def _over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline with the keys of a sweep over its own; sections are put together key by key."""
    merged = dict(base)
    for key, value in changes.items():
        both = key in Config.model_fields and isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = {**base[key], **value} if both else value
    return merged


def _plain(key: str, values: Any) -> Any:
    """The values of a key, methods by the names that points get from them."""
    if key != "method.name" or not isinstance(values, list):
        return values
    return [plain_name(value) if isinstance(value, str) else value for value in values]


def _is_range(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"low", "high"} & set(value))


def _range(key: str, value: Any, path: Path) -> RangeSection:
    try:
        return RangeSection.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors(include_url=False))
        raise ConfigError(
            f"study.keys.{key}: {problems}", path=path, remedy="Write {low: 1.0e-5, high: 1.0e-3}."
        ) from error


def _with(config: Config, values: Mapping[str, Any], told: str) -> Config:
    data = config.model_dump(mode="json")
    for key, value in values.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    try:
        return build_config(data)
    except ConfigError as error:
        raise ConfigError(f"point {told}: {error.message}", remedy=error.remedy) from error


def _unread(sweep: Sweep) -> list[str]:
    """Keys that are read at no point; it is enough to look at the values that decide what else is read."""
    deciding = {key: choices for key, choices in sweep.choices.items() if key in DECIDING}
    configs = []
    for method, names in product(sweep.pipeline.methods, product(*deciding.values())):
        told = dict(zip(deciding, names, strict=True))
        values = {key: deciding[key][name] for key, name in told.items()}
        configs.append(_with(method.config, values, ",".join(f"{key}={name}" for key, name in told.items())))
    return [key for key in sweep.keys if not any(reads(config, key) for config in configs)]


def _checked(sweep: Sweep, path: Path) -> list[Point]:
    """The points of a grid; of a study those that stand for all, of every value beside the settings of the file."""
    swept = swept_methods(sweep)
    if "method.name" in sweep.keys and len(sweep.pipeline.methods) > 1:
        remedy = "Give one entry under methods; zero_shot can be one of the values."
        raise ConfigError("method.name is swept, and there are several methods", path=path, remedy=remedy)
    unread = _unread(sweep)
    if unread:
        remedy = "Take it away, or add a method or a value that does."
        raise ConfigError(f"no point reads {unread[0]}", path=path, remedy=remedy)
    if sweep.split == "val" and sweep.pipeline.settings.folds is not None:
        remedy = "Take folds away, or score test (of a grid)."
        raise ConfigError("folds have no validation cases to score", path=path, remedy=remedy)
    if sweep.settings.study is None:
        return grid_points(sweep)
    if len(swept) != 1:
        remedy = "Leave one; zero_shot may stay beside it."
        raise ConfigError("a study tunes one method, and there are several", path=path, remedy=remedy)
    # What is at the ends of a range, and every value of a list, has to be usable; what lies between is alike.
    points = [Point(method, {}) for method in sweep.pipeline.methods if method not in swept]
    for key, choices in sweep.choices.items():
        points += [point_of(sweep, swept[0], {key: value}, {key: name}) for name, value in choices.items()]
    for key, numbers in sweep.ranges.items():
        ends = numbers.low, numbers.high
        points += [point_of(sweep, swept[0], {key: value}, {key: text_of(value)}) for value in ends]
    return points
