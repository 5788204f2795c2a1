"""What an adapter file says of the segmenter that it belongs to, read as settings or refused by the file's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from medsam_lora import __version__
from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig, plain_name
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.labels import MODALITIES, REGIONS
from medsam_lora.models.input_spec import InputSpec
from medsam_lora.peft import MethodSpec, method_spec
from medsam_lora.transforms.cropping import crop_size
from medsam_lora.transforms.stages import PreparePlan

WRITTEN_HERE: Final = "Use an adapter that medsam-lora wrote."


@dataclass(frozen=True)
class Description:
    """The settings that an adapter was trained with, as far as they decide what it computes."""

    model: ModelConfig
    method: MethodConfig
    fusion: FusionConfig
    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    seed: int
    input_spec: InputSpec
    plan: PreparePlan


def described(metadata: Mapping[str, Any], path: Path | None = None) -> Description:
    """The settings of an adapter.

    Parameters
    ----------
    metadata : mapping
        See `checkpoint.load_adapter`.
    path : Path, optional
        Of the adapter file, for messages.

    Raises
    ------
    AdapterError
        Naming the first entry that cannot be read.
    """
    spec = method_of(metadata, path)
    with _reading("model", path):
        model = ModelConfig.model_validate(metadata["model"])
    with _reading("method_options", path):
        method = MethodConfig.model_validate(metadata["method_options"])
    with _reading("method", path):
        if method.name != plain_name(metadata["method"]):
            raise ValueError(f"{spec.name}, but the options are those of {method.name}")
    with _reading("fusion", path):
        fusion = FusionConfig(name=metadata["fusion"])
    with _reading("modalities", path):
        modalities = _names(metadata["modalities"], MODALITIES)
    with _reading("regions", path):
        regions = _names(metadata["regions"], list(REGIONS))
    with _reading("seed", path):
        seed = int(metadata["seed"])
    with _reading("input_spec", path):
        input_spec = InputSpec.from_json(metadata["input_spec"])
    with _reading("plan", path):
        plan = PreparePlan.from_json(metadata["plan"])
        crop_size(plan.crop)  # refuses one that was not fitted
    return Description(model, method, fusion, modalities, regions, seed, input_spec, plan)


def method_of(metadata: Mapping[str, Any], path: Path | None = None) -> MethodSpec:
    """The method of an adapter.

    Parameters
    ----------
    metadata : mapping
        See `checkpoint.load_adapter`.
    path : Path, optional
        Of the adapter file, for messages.

    Raises
    ------
    AdapterError
        Where this version knows no such method.
    """
    name, version = metadata["method"], metadata.get("package_version", "an unknown version")
    try:
        return method_spec(str(name))
    except ConfigError as error:
        raise AdapterError(
            f"its method is {name!r}, which medsam-lora {__version__} does not know: the file is of a newer version, "
            f"or of another program (it names {version})",
            path=path,
            remedy="Use the version of medsam-lora that wrote it, or a newer one.",
        ) from error


def _names(given: Any, known: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"a list of names is needed, not {given!r}")
    if not given:
        raise ValueError("none is named")
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is none of {', '.join(known)}")
    twice = [name for name in known if given.count(name) > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice")
    return tuple(given)


@contextmanager
def _reading(entry: str, path: Path | None) -> Iterator[None]:
    """One error for whatever a malformed entry raises."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise AdapterError(f"its metadata cannot be read: {entry}: {cause}", path=path, remedy=WRITTEN_HERE) from error
