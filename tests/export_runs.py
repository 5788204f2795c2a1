"""Run folders with an adapter of a small real model, for the tests of exports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.models.assemble import adapter_metadata, build_segmenter
from medsam_lora.models.checkpoint import save_adapter
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.stages import PreparePlan

SIZE = 64
BASE = ModelConfig(name="vit_nano", weights="random", image_size=SIZE)


def run_folder(
    folder: Path,
    method: MethodConfig,
    model: ModelConfig = BASE,
    fusion: str = "mean_logit",
    modalities: Sequence[str] = ("t1c", "t2f"),
    regions: Sequence[str] = ("WT",),
    crop: tuple[int, int] | None = (48, 30),
) -> Path:
    """A folder with an adapter whose tensors are all moved away from where they start."""
    fused = FusionConfig(name=fusion)
    segmenter = build_segmenter(model, method, fused, modalities, regions, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    moved = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in segmenter.adapter_state().items()
    }
    plan = PreparePlan(tuple(modalities), crop=CropPlan("none") if crop is None else CropPlan(size=crop))
    metadata = {
        **adapter_metadata(segmenter, model, method, fused, 0),
        "plan": plan.to_json(),
        "prompts": {"kind": "union", "min_voxels": 1},
    }
    save_adapter(folder / "adapter.safetensors", moved, metadata)
    return folder


def snippet(section: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the Python of one section of docs/export.md leaves in its names, run in the working directory."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    text = page.partition(f"\n{section}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/export.md", "exec"), names)
    return names
