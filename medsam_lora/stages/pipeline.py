"""What a pipeline file says: which stages, with which methods, over which cohort, with which settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from medsam_lora.config import Config, Section, apply_overrides, build_config, load_yaml, nearest, plain_name
from medsam_lora.errors import ConfigError, MedsamLoraError
from medsam_lora.stages.case_boxes import check_prompts
from medsam_lora.stages.scoring import FLOOR

Stage = Literal["verify", "prepare", "train", "predict", "evaluate", "compare", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)

# A label is the name of a folder: what is no plain name would lie elsewhere.
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class PhantomSection(Section):
    """A synthetic cohort made instead of reading one."""

    cases: int = Field(12, ge=3, description="Number of cases.")
    seed: int = Field(0, ge=0, description="Seed of the cohort.")
    shape: list[int] = Field([96, 112, 64], min_length=3, max_length=3, description="Voxels along each axis.")


class SplitSection(Section):
    """Shares of the patients, where the manifest is built by the pipeline and no folds are asked for."""

    train: float = Field(0.7, ge=0, le=1, description="Share of training patients.")
    val: float = Field(0.15, ge=0, le=1, description="Share of validation patients.")
    test: float = Field(0.15, ge=0, le=1, description="Share of test patients.")
    seed: int = Field(0, ge=0, description="Seed of the split.")


class CourseSection(Section):
    """A part of pre-training; where it has several sizes, they take turns step by step."""

    steps: int = Field(ge=1, description="Optimiser steps.")
    sizes: list[int] = Field(min_length=1, description="Sides of the pictures, multiples of 16.")
    pictures: list[int] = Field(min_length=1, description="Pictures per step, one number for each size.")
    shapes: float = Field(0.0, ge=0, le=1, description="Share of pictures of datasets.shapes instead of scenes.")
    shaken: float = Field(0.5, ge=0, le=1, description="Share of boxes whose edges are moved.")
    restart: float = Field(
        0.0, ge=0, le=1, description="Where above 0, the learning rate rises to this share of lr and falls anew."
    )

    @model_validator(mode="after")
    def _fitting(self) -> CourseSection:
        if len(self.sizes) != len(self.pictures):
            raise ValueError("sizes and pictures must be equally many")
        if any(size % 16 or size < 32 for size in self.sizes) or min(self.pictures) < 1:
            raise ValueError("sizes are multiples of 16 from 32, pictures at least 1")
        return self


class PretrainSection(Section):
    """Training of vit_nano on synthetic scenes (`medsam-lora pretrain`)."""

    courses: list[CourseSection] = Field(
        [CourseSection(steps=200, sizes=[64], pictures=[16])], min_length=1, description="Parts, one after the other."
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.05, ge=0, description="Of AdamW.")
    image_size: int = Field(256, ge=32, description="The model's own size, at which it is scored.")
    averaged: int = Field(
        1, ge=1, description="Weights are the mean over so many last ends of the rate (before a restart; the last)."
    )
    processes: int = Field(1, ge=1, description="Processes that share each batch and average their gradients.")
    validate_every: int = Field(200, ge=1, description="Steps between held-out shapes and saved states.")
    validate_shapes: int = Field(96, ge=1, description="Held-out shapes, of a seed of their own.")
    seed: int = Field(0, ge=0, description="Seed.")


class PipelineSection(Section):
    """The keys of a pipeline file beside the sections of `Config`."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the pipeline.")
    description: str = Field("", description="What it is for.")
    stages: list[Stage] = Field(list(STAGES), description="Stages to run, in this order.")
    root: str | None = Field(
        None, description="Data root; null is $MEDSAM_LORA_BRATS_DIR, else shared/data/brats beside the checkout."
    )
    manifest: str | None = Field(None, description="Manifest; null builds one by discovering the root.")
    phantom: PhantomSection | None = Field(None, description="Make a synthetic cohort and use it.")
    split: SplitSection = Field(SplitSection(), description="Shares of train, val and test.")
    folds: int | None = Field(None, ge=2, description="Cross-validation folds over patients instead of one split.")
    pretrain: PretrainSection | None = Field(None, description="Train vit_nano on shapes first.")
    methods: list[dict[str, Any]] = Field(
        [{"name": "zero_shot"}, {"name": "lora"}],
        min_length=1,
        description="One run each: options of `method`, an optional `label`, and whole sections to change.",
    )

    @model_validator(mode="after")
    def _stages_in_order(self) -> PipelineSection:
        positions = [STAGES.index(stage) for stage in self.stages]
        if positions != sorted(set(positions)):
            raise ValueError(f"stages must be in the order {', '.join(STAGES)}")
        return self


@dataclass(frozen=True)
class Method:
    """One run of a pipeline: the name of its folder and its whole configuration."""

    label: str
    config: Config


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline; `path` is its file, where it has one."""

    settings: PipelineSection
    methods: tuple[Method, ...]
    base: Config
    path: Path | None = None


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline file whole.

    Parameters
    ----------
    path : Path
    overrides : sequence of str
        ``section.key=value`` over the sections of every method, and ``pipeline.key=value`` (or
        ``phantom.key=value``, ``split.key=value``, ``pretrain.key=value``) over the pipeline's own keys.

    Raises
    ------
    ConfigError
        Where a key is unknown or ill-typed, a label cannot name a folder or is given twice, or methods are not to be
        scored alike.
    """
    return parse_pipeline(load_yaml(path), overrides, path)


def parse_pipeline(data: Mapping[str, Any], overrides: Sequence[str] = (), path: Path | None = None) -> Pipeline:
    """As `load_pipeline`, from data already read."""
    own_keys = set(PipelineSection.model_fields)
    sections = set(Config.model_fields)
    for key in data:
        if key not in own_keys | sections:
            guess = nearest(key, sorted(own_keys | sections))
            hint = f"; did you mean {guess}?" if guess else ""
            raise ConfigError(f"unknown key {key}{hint}", path=path, remedy="See pipelines/README.md.")
    own = {k: v for k, v in data.items() if k in own_keys}
    mine = [t for t in overrides if t.partition(".")[0] in {"pipeline", *own_keys}]
    shared = [t for t in overrides if t not in mine]
    settings = _settings(own, mine, path)
    base_data = {k: v for k, v in data.items() if k in sections}
    methods = [_method(base_data, entry, shared, path) for entry in _entries(settings, shared)]
    labels = [m.label for m in methods]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"two methods are called {twice[0]!r}", path=path, remedy="Give one of them another `label`.")
    base = build_config(apply_overrides(base_data, shared), path)
    _refuse_scores_apart(methods, base, path)
    return Pipeline(settings, tuple(methods), base, path)


def check_methods(methods: Sequence[Method], path: Path | None, kind: str = "method") -> None:
    """Refuse settings that a method cannot be used with: each is attached to a model without numbers, in no time.

    Parameters
    ----------
    methods : sequence of Method
    path : Path or None
        Of the file that they are of.
    kind : str
        What has the labels: ``method``, or ``point`` of a sweep.

    Raises
    ------
    ConfigError
        With the label of the first that cannot be used.
    """
    # What reads a pipeline needs no torch.
    import torch

    from medsam_lora.models.sam import SamModel, blank, check_attention
    from medsam_lora.peft import attach

    models: dict[tuple[str, int | None], SamModel] = {}
    known = set()
    for method in methods:
        model, adaptation = method.config.model, method.config.method
        prompts = method.config.predict.prompts
        settings = model.name, model.image_size, model.grid, model.attention, adaptation.model_dump_json(), prompts
        if settings in known:
            continue
        try:
            check_prompts(prompts, adaptation.name)
            check_attention(model.name, model.grid, model.attention)
            size = model.name, model.image_size
            if size not in models:
                with torch.device("meta"):
                    models[size] = blank(*size)
            attach(models[size], adaptation, 0).detach()
        except MedsamLoraError as error:
            raise ConfigError(f"{kind} {method.label}: {error.message}", path=path, remedy=error.remedy) from error
        known.add(settings)


@contextmanager
def of_file(path: Path | None) -> Iterator[None]:
    """Within it, a fault of the settings that names no file names this one."""
    try:
        yield
    except ConfigError as error:
        if error.path is not None or path is None:
            raise
        raise ConfigError(error.message, path=path, remedy=error.remedy) from error


def _refuse_scores_apart(methods: Sequence[Method], base: Config, path: Path | None) -> None:
    """Refuse methods whose scores could not be compared."""
    own = [method.label for method in methods if method.config.evaluate != base.evaluate]
    if own:
        raise ConfigError(
            f"the method {own[0]} has a section evaluate of its own",
            path=path,
            remedy="All methods of a pipeline are scored alike: put it beside `methods`.",
        )
    if len({method.config.predict.prompts for method in methods}) > 1:
        raise ConfigError(
            "predict.prompts differs between the methods, whose scores then cannot be compared",
            path=path,
            remedy="Set it for all of them, or make two pipelines.",
        )


def _settings(own: Mapping[str, Any], overrides: Sequence[str], path: Path | None) -> PipelineSection:
    nested = apply_overrides({"pipeline": dict(own)}, [t for t in overrides if t.startswith("pipeline.")])["pipeline"]
    changed = apply_overrides(
        {k: v for k, v in nested.items() if isinstance(v, Mapping)},
        [t for t in overrides if not t.startswith("pipeline.")],
    )
    try:
        return PipelineSection.model_validate({**nested, **changed})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise ConfigError(problems, path=path, remedy="See pipelines/README.md.") from error


def _entries(settings: PipelineSection, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The method entries; ``--set method.name=X`` chooses X among them, or replaces them where X is none of them."""
    chosen = apply_overrides({}, [t for t in overrides if t.startswith("method.name=")]).get("method", {}).get("name")
    if chosen is None:
        return settings.methods
    named = [e for e in settings.methods if plain_name(str(e.get("name"))) == plain_name(str(chosen))]
    return named or [{"name": chosen}]


def _method(base: Mapping[str, Any], entry: Mapping[str, Any], overrides: Sequence[str], path: Path | None) -> Method:
    data: dict[str, Any] = {k: dict(v or {}) for k, v in base.items()}
    options = {k: v for k, v in entry.items() if k not in Config.model_fields and k != "label"}
    for section, changes in entry.items():
        if section in Config.model_fields:
            data[section] = {**data.get(section, {}), **changes}
    data["method"] = {**data.get("method", {}), **options}
    config = build_config(apply_overrides(data, overrides), path)
    with of_file(path):
        check_prompts(config.predict.prompts, config.method.name)
    return Method(_label(entry, config, path), config)


def _label(entry: Mapping[str, Any], config: Config, path: Path | None) -> str:
    label = str(entry.get("label", config.method.name))
    if not _LABEL.fullmatch(label):
        raise ConfigError(
            f"the label {label!r} of a method cannot be the name of its folder",
            path=path,
            remedy="Use letters, digits and ._+- only, a letter or digit first.",
        )
    if label == FLOOR:
        raise ConfigError(
            f"a method is called {label!r}, as the floor that is scored beside all methods is",
            path=path,
            remedy="Give it another `label`.",
        )
    return label
