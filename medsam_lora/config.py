"""The settings of every stage: one pydantic model per section, unknown keys refused before any work.

The library itself takes plain arguments; only the stages and the command line read a `Config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medsam_lora.errors import ConfigError, nearest
from medsam_lora.labels import MODALITIES, REGIONS

__all__ = [
    "Config",
    "Section",
    "apply_overrides",
    "build_config",
    "dump_config",
    "load_config",
    "load_yaml",
    "nearest",
    "number_aware",
    "plain_name",
]

Modality = Literal["t1n", "t1c", "t2f", "t2w"]


class Section(BaseModel):
    """A section: immutable, no unknown keys, no silent conversion of strings to numbers, finite numbers only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which files are read and what is tolerated in them."""

    modalities: list[Modality] = Field(
        list(MODALITIES), min_length=1, description="Modalities used, any subset; always in the canonical order."
    )
    max_gib: float = Field(2.0, gt=0, description="Cap on the bytes a header may claim, in GiB.")
    nonfinite: Literal["reject", "zero"] = Field("reject", description="What to do with NaN and infinite voxels.")

    @field_validator("modalities")
    @classmethod
    def _canonical_order(cls, modalities: list[Modality]) -> list[Modality]:
        if len(set(modalities)) != len(modalities):
            raise ValueError("a modality is named twice")
        return sorted(modalities, key=MODALITIES.index)


class SlicingConfig(Section):
    """Which transverse slices are stored for training."""

    name: Literal["full", "every_second", "random", "max_slice"] = Field(
        "full", description="full: all; every_second: every `step`-th; random: `count`; max_slice: largest tumour area."
    )
    step: int = Field(2, ge=1, description="Step of every_second.")
    count: int = Field(16, ge=1, description="Slices per case of random.")
    seed: int = Field(0, ge=0, description="Seed of random and of the choice of empty slices.")
    tumour_only: bool = Field(True, description="Choose among slices that show the region only.")
    empty_share: float = Field(
        0.0, ge=0, lt=1, description="Share of the stored slices that are free of tumour (needs tumour_only: true)."
    )


class CropConfig(Section):
    """The centre crop of the transverse plane."""

    name: Literal["brain_box", "none"] = Field("brain_box", description="none keeps the whole plane.")
    centre: Literal["image", "box"] = Field(
        "image", description="Centre of the crop: the image's, or that of the fitted brain box."
    )
    size: tuple[int, int] | None = Field(
        None, description="Fixed size in voxels (X, Y) such as [138, 202]; null fits it over the training split."
    )
    margin: int = Field(0, ge=0, description="Voxels added on every side of a fitted box.")
    allow_tumour_loss: bool = Field(False, description="Go on where the crop cuts tumour voxels off.")

    @model_validator(mode="before")
    @classmethod
    def _size_from_list(cls, data: Any) -> Any:
        # YAML knows lists only; strict mode would refuse them for a tuple.
        if isinstance(data, Mapping) and isinstance(data.get("size"), list):
            return {**data, "size": tuple(data["size"])}
        return data


class IntensityConfig(Section):
    """The z-score normalisation."""

    voxels: Literal["nonzero", "all"] = Field("nonzero", description="Voxels the mean and deviation are taken over.")
    scope: Literal["volume", "slice"] = Field("volume", description="Statistics per case or per slice.")


class PromptConfig(Section):
    """Box prompts made from the reference."""

    boxes: Literal["union", "per_component"] = Field(
        "union", description="One box around all tumour of a slice, or one per connected component."
    )
    jitter_px: float = Field(
        0.0, ge=0, le=20, description="Largest shift of each box edge in model pixels, at training only."
    )
    min_component_voxels: int = Field(1, ge=1, description="Components smaller than this get no box of their own.")


class ModelConfig(Section):
    """The base model."""

    name: Literal["vit_b", "vit_l", "vit_h", "vit_t", "vit_nano"] = Field("vit_t", description="A key of MODELS.")
    weights: str | None = Field(
        None, description="official (of vit_nano those in the package), a checkpoint file, random; null is official."
    )
    image_size: int | None = Field(None, ge=32, description="Side of the model frame; null is the model's own.")
    grid: Literal["padded", "unpadded"] = Field(
        "padded",
        description="padded: the encoder sees the square model frame, as SAM was trained; unpadded: only the patches "
        "that the image reaches, another function at its border. An adapter is used as it was trained.",
    )
    attention: Literal["auto", "reference", "chunked", "augmented", "biased"] = Field(
        "auto",
        description="How a ViT's attention is computed (ATTENTIONS), the numbers being the same; auto is what suits "
        "the device; reference is segment_anything's own code. vit_t has one way.",
    )
    input_range: Literal["window", "minmax", "zscore"] = Field(
        "window", description="How z-scores become the 0-255 range the weights were trained on (InputSpec)."
    )
    seed: int = Field(0, ge=0, description="Seed of random weights.")


class MethodConfig(Section):
    """The adaptation; a method ignores the options that it does not read (`medsam-lora methods` lists those)."""

    name: str = Field("lora", description="A key of METHODS, or several joined by +, such as sam_parser+lora.")
    decoder: Literal["full", "lora", "frozen"] = Field(
        "full", description="Whether the mask decoder is trained as well: whole, by low-rank branches, or not."
    )
    blocks: list[int] | Annotated[str, Field(pattern=r"^(global|last [1-9]\d*)$")] | None = Field(
        None,
        description="Encoder blocks adapted: indices, negative from the end; global (those with global attention); "
        "last k; null is all of them.",
    )
    rank: int = Field(8, ge=1, description="LoRA rank.")
    alpha: float = Field(8.0, gt=0, description="LoRA numerator of the scale.")
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "none"] = Field(
        "alpha/r", description="LoRA scale of the branch: alpha / rank, rank-stabilised, or 1."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA input.")
    targets: list[Literal["q", "k", "v", "proj", "mlp"]] = Field(
        ["q", "v"], min_length=1, description="Projections that receive LoRA."
    )
    dora: bool = Field(False, description="LoRA with trained row magnitudes (DoRA).")
    init: Literal["kaiming", "pissa"] = Field(
        "kaiming", description="LoRA start: A random and B zero, or the largest singular values of the base (PiSSA)."
    )
    lora_plus: float = Field(1.0, gt=0, description="Learning rate of LoRA's B over that of A (LoRA+).")
    bottleneck: int | None = Field(
        None, ge=1, description="Width inside an adapter; null is 64, or a quarter of the block's for prompt_generator."
    )
    adapter_scale: float = Field(0.1, gt=0, description="Factor of the parallel branch of adaptformer.")
    tokens: int | None = Field(
        None, ge=1, description="Learned tokens; null is 10 per block for prefix and vpt_deep, 2 for prompt_tokens."
    )
    depth: int = Field(
        1, ge=1, description="Slices of a stack of sd_trans, odd; 1 is the plane alone. Memory grows with it."
    )
    layers: list[Literal["neck", "patch", "linears"]] = Field(
        ["neck"],
        min_length=1,
        description="What sam_parser decomposes: convolutions of the neck, of the patch embedding, Linears of blocks.",
    )
    bases: bool = Field(False, description="Also train the singular vectors of sam_parser.")
    lr_singular: float = Field(5e-3, gt=0, description="Learning rate of the singular values of sam_parser.")

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        return plain_name(name)


class FusionConfig(Section):
    """How the modalities of one slice become one mask."""

    name: Literal["mean_logit", "mean_probability", "max", "vote", "learned"] = Field(
        "mean_logit", description="A key of FUSIONS."
    )


class TrainConfig(Section):
    """Optimisation."""

    epochs: int = Field(10, ge=1, description="Epochs.")
    slices_per_epoch: int | None = Field(
        None,
        ge=1,
        description="Slices drawn per epoch, some again where there are fewer; null is each training slice once.",
    )
    batch_size: int = Field(2, ge=1, description="Slices per step, each with all its modalities.")
    accumulation: int = Field(1, ge=1, description="Steps whose gradients are added up before an update.")
    processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine that share every batch, each on a GPU of its own or all on the CPU; "
        "torchrun, where it is used, decides instead.",
    )
    checkpointing: bool = Field(
        False,
        description="Keep only the input of each encoder block and compute the block again in the backward pass: a "
        "fraction of the memory, about a third more time.",
    )
    compile: bool = Field(
        False,
        description="Encoder blocks through torch.compile while training: on CPUs faster for vit_b at 1024 px, not for "
        "vit_t; needs a C++ compiler there, Triton on CUDA.",
    )
    optimiser: Literal["adamw", "adam"] = Field("adamw", description="Adam or AdamW.")
    lr: float = Field(1e-4, gt=0, description="Learning rate of the adapter and the mask decoder.")
    lr_encoder: float | None = Field(None, gt=0, description="Learning rate of encoder tensors; null is `lr`.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay, on matrices only.")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="Share of all steps with a linearly rising rate.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="After the warm-up.")
    clip_norm: float | None = Field(1.0, gt=0, description="Largest gradient norm; null is no clipping.")
    amp: Literal["none", "tf32", "bf16", "fp16", "auto"] = Field(
        "none",
        description="Autocast of the forward pass; auto is bf16 where the hardware computes in it; tf32 is float32 "
        "with products in TensorFloat-32 (CUDA only).",
    )
    dice_weight: float = Field(1.0, ge=0, description="Weight of the Dice term.")
    bce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy term.")
    focal_share: float = Field(0.0, ge=0, le=1, description="lambda of (1 - lambda) BCE + lambda focal.")
    focal_gamma: float = Field(2.0, ge=0, description="Focusing exponent of the focal term.")
    flip: bool = Field(False, description="Mirror slices left-right at random (boxes along).")
    select: Literal["best", "last"] = Field(
        "best", description="Keep the epoch of best validation volumetric Dice, or the last one."
    )
    patience: int | None = Field(None, ge=1, description="Epochs without a better validation Dice before stopping.")
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")
    seed: int = Field(0, ge=0, description="Seed of initialisation, order, jitter and augmentation.")
    regions: list[Literal["WT", "TC", "ET"]] = Field(
        ["WT"], description="Regions predicted: [WT], or [WT, TC, ET] from SAM's three masks for ambiguous prompts."
    )
    postprocess: Literal["none", "fitted"] = Field(
        "none",
        description="fitted: small components are removed and holes filled as suits the validation cases.",
    )
    cache_gib: float = Field(
        0.0,
        ge=0,
        description="Room on disk for what the encoder computes before anything that is trained (embeddings, or "
        "activations at the method's cache point), each slice once; 0 keeps none.",
    )
    tensorboard: bool = Field(False, description="Also write TensorBoard events (extra `track`).")

    @field_validator("regions")
    @classmethod
    def _one_or_all(cls, regions: list[str]) -> list[str]:
        if sorted(regions) == sorted(REGIONS):
            return list(REGIONS)
        if regions != ["WT"]:
            raise ValueError("must be [WT] or [WT, TC, ET]")
        return regions


class PredictConfig(Section):
    """Prediction of whole cases."""

    batch_size: int = Field(4, ge=1, description="Slices per forward pass, each with all its modalities.")
    amp: Literal["none", "tf32", "bf16", "fp16", "auto"] = Field(
        "none",
        description="Autocast of the forward pass; auto is bf16 where the hardware computes in it; tf32 is float32 "
        "with products in TensorFloat-32 (CUDA only).",
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="Probability above which a voxel is tumour.")
    prompts: Literal["boxes", "none"] = Field(
        "boxes",
        description="boxes: those of a table or of the reference; none: every slice that shows brain, without a "
        "prompt, for methods that need none (prompt_tokens).",
    )
    keep_embeddings: bool = Field(
        False,
        description="Keep the embeddings of this adapter in the room of train.cache_gib, so that a second prediction "
        "with other boxes needs no encoder; those of methods that leave the encoder as it is are kept anyway.",
    )


class EvaluateConfig(Section):
    """Scoring."""

    bootstrap: int = Field(2000, ge=100, description="Bootstrap resamples of the summary's interval.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
    challenge: Literal["brats2023-gli", "brats2023-men", "brats2023-met", "brats2023-ssa", "brats2023-ped"] | None = (
        Field(None, description="Also score surfaces and lesions, as this challenge does.")
    )


class Config(Section):
    """All sections. `medsam-lora config --schema` prints this with every default and description."""

    data: DataConfig = DataConfig()
    slicing: SlicingConfig = SlicingConfig()
    crop: CropConfig = CropConfig()
    intensity: IntensityConfig = IntensityConfig()
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    fusion: FusionConfig = FusionConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping safely.

    Raises
    ------
    ConfigError
        Where the file is missing, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError("no such file", path=path, remedy="Check the path.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML ({text})", path=path, remedy="Correct the YAML.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError("the file must hold sections with keys", path=path, remedy="See pipelines/README.md.")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sections with ``section.key=value`` settings put over them; values are read as YAML.

    Examples
    --------
    >>> apply_overrides({"train": {"epochs": 3, "lr": 0.1}}, ["train.epochs=5", "method.name=lora"])
    {'train': {'epochs': 5, 'lr': 0.1}, 'method': {'name': 'lora'}}
    """
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"--set {text!r} is not of the form section.key=value", remedy="Write train.epochs=5.")
        try:
            parsed = number_aware(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r} has a value that is not YAML", remedy="Quote the value.") from error
        target = merged.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"section {section!r} must hold keys", remedy="See medsam-lora config --schema.")
        target[name] = parsed
    return merged


def build_config(data: Mapping[str, Any], path: Path | None = None) -> Config:
    """Check sections whole and make a `Config`.

    Raises
    ------
    ConfigError
        Listing every unknown key (with the nearest known one) and every ill-typed value.

    Examples
    --------
    >>> build_config({"train": {"epochs": 3}}).train.epochs
    3
    >>> build_config({"train": {"epoch": 3}})
    Traceback (most recent call last):
        ...
    medsam_lora.errors.ConfigError: unknown key train.epoch; did you mean train.epochs?...
    """
    try:
        return Config.model_validate({k: {} if v is None else number_aware(v) for k, v in data.items()})
    except ValidationError as error:
        problems = [_explain(dict(e)) for e in error.errors()]
        raise ConfigError(
            "; ".join(problems), path=path, remedy="See medsam-lora config --schema for every key."
        ) from error


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """A `Config` from an optional YAML file and ``section.key=value`` settings over it."""
    data = {} if path is None else load_yaml(path)
    return build_config(apply_overrides(data, overrides), path)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, from which `load_config` makes an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def number_aware(value: Any) -> Any:
    """A value of YAML with numbers such as 1e-4 as numbers, at any depth.

    Examples
    --------
    >>> number_aware({"lr": ["1e-4", "vit_b"]})
    {'lr': [0.0001, 'vit_b']}
    """
    # YAML 1.1 reads 1e-4 (no dot) as a string; every researcher writes it as a number.
    if isinstance(value, dict):
        return {k: number_aware(v) for k, v in value.items()}
    if isinstance(value, list):
        return [number_aware(v) for v in value]
    if isinstance(value, str) and value[:1] in "0123456789.+-" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def plain_name(name: str) -> str:
    """The name of a method, or of several joined by ``+``, without spaces around its parts.

    Examples
    --------
    >>> plain_name(" lora + sam_parser")
    'lora+sam_parser'
    """
    return "+".join(part.strip() for part in name.split("+"))


def _explain(error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] != "extra_forbidden":
        return f"{name}: {error['msg'].removeprefix('Value error, ')} (given: {error['input']!r})"
    if len(location) == 1:
        known = list(Config.model_fields)
        guess = nearest(location[0], known)
    else:
        section, key = location[0], location[-1]
        known = [f"{section}.{k}" for k in type(Config.model_fields[section].default).model_fields]
        guess = _nearest_key(section, key)
    hint = f"; did you mean {guess}?" if guess else f"; known: {', '.join(known)}"
    return f"unknown key {name}{hint}"


def _nearest_key(section: str, key: str) -> str | None:
    """The key meant: this very one in another section, else a like one in this section, else in any."""
    keys = {s: list(type(field.default).model_fields) for s, field in Config.model_fields.items()}
    for s, names in keys.items():
        if key in names:
            return f"{s}.{key}"
    here = nearest(key, keys[section])
    if here:
        return f"{section}.{here}"
    every = {k: f"{s}.{k}" for s, names in keys.items() for k in names}
    guess = nearest(key, list(every))
    return every[guess] if guess else None
