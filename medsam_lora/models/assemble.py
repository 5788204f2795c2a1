"""Putting a segmenter together: from settings for training, from an adapter file for everything after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from medsam_lora import __version__
from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.errors import AdapterError, ConfigError, WeightsError
from medsam_lora.io.files import sha256_of
from medsam_lora.models.checkpoint import both_bases, check_base, load_adapter
from medsam_lora.models.description import described
from medsam_lora.models.fusion import build_fusion
from medsam_lora.models.input_spec import INPUT_RANGES
from medsam_lora.models.sam import build
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import attach

NAMED_WEIGHTS: Final = (None, "official", "random")
"""What ``model.weights`` is where it is not the path of a checkpoint."""


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
    if model.weights not in NAMED_WEIGHTS:
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
        Where the file is damaged or does not fit the base weights; where they or its tensors do not fit, the hashes of
        both bases are named.
    """
    tensors, metadata = load_adapter(path)
    try:
        segmenter = segmenter_of(metadata, path, weights, device, attention)
    except WeightsError as error:
        named = described(metadata, path).model.weights if weights is None else weights
        if named in NAMED_WEIGHTS or error.path is None or not error.path.is_file():
            raise
        digest = sha256_of(error.path)
        if digest == metadata["base_sha256"]:
            raise
        # Of another architecture, or damaged: what is wrong with it matters less than which file is meant.
        raise AdapterError(
            f"{error.path} does not hold the base weights that the adapter was trained on: {error.message} "
            f"({both_bases(metadata, digest)})",
            path=path,
            remedy="Set model.weights to the checkpoint that the adapter was trained on.",
        ) from error
    sam = segmenter.sam
    check_base(metadata, sam.name, sam.base_sha256, sam.image_size, path, sam.grid)
    put_in(segmenter, tensors, metadata, path)
    return segmenter.eval(), metadata


def put_in(segmenter: Segmenter, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path) -> None:
    """Copy the tensors of an adapter file into a segmenter, strictly.

    Parameters
    ----------
    segmenter : Segmenter
    tensors, metadata : mapping
        From `load_adapter`.
    path : Path
        Of the adapter file, for messages.

    Raises
    ------
    AdapterError
        Where they do not fit, with the file and the hashes of both bases.
    """
    here = {name: tensor.to(segmenter.device) for name, tensor in tensors.items()}
    try:
        segmenter.load_adapter_state(here)
    except (AdapterError, RuntimeError) as error:
        # torch's own, of the fusion, runs over several lines.
        text = error.message if isinstance(error, AdapterError) else " ".join(str(error).split())
        raise AdapterError(
            f"{text} ({both_bases(metadata, segmenter.sam.base_sha256)})",
            path=path,
            remedy="Use the base model, the fusion and the method options that the adapter was trained with.",
        ) from error


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
    said = described(metadata, path)
    given = {"weights": weights, "attention": attention}
    model = said.model.model_copy(update={name: value for name, value in given.items() if value is not None})
    device = torch.device("cpu") if device is None else device
    segmenter = build_segmenter(model, said.method, said.fusion, said.modalities, said.regions, said.seed, device)
    segmenter.input_spec = said.input_spec
    return segmenter
