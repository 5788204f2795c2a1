"""Putting a segmenter together: from settings for training, from an adapter file for everything after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medsam_lora import __version__
from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.models.checkpoint import check_base, load_adapter
from medsam_lora.models.fusion import build_fusion
from medsam_lora.models.input_spec import INPUT_RANGES, InputSpec
from medsam_lora.models.sam import build
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import attach


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; ``auto`` is CUDA where there is one, else the CPU.

    Raises
    ------
    ConfigError
        Where torch does not know the name or the device is not there.

    Examples
    --------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]})", remedy="Use --device auto or cpu."
        ) from error
    return device


def build_segmenter(
    model: ModelConfig,
    method: MethodConfig,
    fusion: FusionConfig,
    modalities: Sequence[str],
    regions: Sequence[str],
    seed: int,
    device: torch.device,
) -> Segmenter:
    """A base model with a fresh adaptation.

    Parameters
    ----------
    model, method, fusion : config sections
    modalities, regions : sequence of str
    seed : int
        Of the adapter's initialisation.
    device : torch.device
    """
    sam = build(model.name, model.weights, model.image_size, model.seed, grid=model.grid, attention=model.attention).to(
        device
    )
    adaptation = attach(sam, method, seed)
    fused = build_fusion(fusion.name, modalities).to(device)
    if method.name == "zero_shot":
        fused.requires_grad_(False)
    return Segmenter(sam, adaptation, fused, INPUT_RANGES[model.input_range], modalities, regions).to(device)


def adapter_metadata(
    segmenter: Segmenter, model: ModelConfig, method: MethodConfig, fusion: FusionConfig, seed: int
) -> dict[str, Any]:
    """What an adapter file says of itself: enough to rebuild the segmenter and to refuse a wrong base.

    The caller adds what it knows of data and training (crop, normalisation, prompts).

    Parameters
    ----------
    segmenter : Segmenter
    model, method, fusion : Section
        The settings it was built from.
    seed : int
        That of the adaptation.
    """
    if model.weights not in (None, "official", "random"):
        # The adapter is used from other working directories than the one it was trained in.
        model = model.model_copy(update={"weights": str(Path(model.weights).expanduser().resolve())})
    return {
        "package_version": __version__,
        "method": method.name,
        "method_options": method.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "model_name": model.name,
        "base_sha256": segmenter.sam.base_sha256,
        "image_size": segmenter.sam.image_size,
        "grid": segmenter.sam.grid,
        "input_spec": segmenter.input_spec.to_json(),
        "fusion": fusion.name,
        "modalities": list(segmenter.modalities),
        "regions": list(segmenter.regions),
        "seed": seed,
    }


def load_segmenter(
    path: Path, weights: str | None = None, device: torch.device | None = None, attention: str | None = None
) -> tuple[Segmenter, Mapping[str, Any]]:
    """Rebuild a segmenter from its adapter file and its base weights.

    Parameters
    ----------
    path : Path
        ``adapter.safetensors``.
    weights : str, optional
        Where the base weights are now, if not where they were at training; they must be the same by their sha256.
    device : torch.device, optional
        The CPU by default.
    attention : str, optional
        How to compute attention here (`attention_choice.ATTENTIONS`), if not as at training; the function is the same.

    Returns
    -------
    segmenter : Segmenter
        In evaluation mode.
    metadata : mapping

    Raises
    ------
    AdapterError
        Where the file is damaged or does not fit the base weights.
    """
    tensors, metadata = load_adapter(path)
    segmenter = segmenter_of(metadata, path, weights, device, attention)
    sam = segmenter.sam
    check_base(metadata, sam.name, sam.base_sha256, sam.image_size, path, sam.grid)
    segmenter.load_adapter_state({name: tensor.to(segmenter.device) for name, tensor in tensors.items()})
    return segmenter.eval(), metadata


def segmenter_of(
    metadata: Mapping[str, Any],
    path: Path | None = None,
    weights: str | None = None,
    device: torch.device | None = None,
    attention: str | None = None,
) -> Segmenter:
    """A segmenter as an adapter file describes it, with its method attached and nothing trained in it.

    Parameters
    ----------
    metadata : mapping
        See `load_adapter`.
    path : Path, optional
        Of the adapter file, for messages.
    weights, device, attention
        As `load_segmenter` takes them; the base is whatever `weights` names.

    Raises
    ------
    AdapterError
        Where the metadata makes no segmenter.
    """
    try:
        model = ModelConfig.model_validate(metadata["model"])
        method = MethodConfig.model_validate(metadata["method_options"])
        fusion = FusionConfig(name=metadata["fusion"])
        modalities, regions = metadata["modalities"], metadata["regions"]
        seed, spec = int(metadata["seed"]), InputSpec.from_json(metadata["input_spec"])
    except (KeyError, ValueError) as error:
        raise AdapterError(
            f"its metadata cannot be read ({error})", path=path, remedy="Use an adapter that medsam-lora wrote."
        ) from error
    given = {"weights": weights, "attention": attention}
    model = model.model_copy(update={name: value for name, value in given.items() if value is not None})
    device = torch.device("cpu") if device is None else device
    segmenter = build_segmenter(model, method, fusion, modalities, regions, seed, device)
    segmenter.input_spec = spec
    return segmenter
