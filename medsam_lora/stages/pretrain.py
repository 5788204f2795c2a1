"""Pre-training of vit_nano on synthetic scenes, once per output folder; a run that was stopped goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from medsam_lora.config import apply_overrides, load_yaml
from medsam_lora.errors import ConfigError, TrainingError
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.tables import write_table
from medsam_lora.models import MODELS
from medsam_lora.models.allocator import is_out_of_memory, keep_freed_memory
from medsam_lora.models.assemble import choose_device
from medsam_lora.models.sam import SamModel, build
from medsam_lora.stages.pipeline import PretrainSection
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.training.distributed import Group, check_gpus, joined, launch
from medsam_lora.training.held_out import HELD_OUT_SEED, scene_iou, shape_iou
from medsam_lora.training.pretrain import new_optimiser, pretrain
from medsam_lora.training.recipe import Course, Recipe
from medsam_lora.training.state import load_state, save_state

logger = logging.getLogger(__name__)

WEIGHTS_FILE, CURVE_FILE, RECORD_FILE, STATE_FILE = "nano.safetensors", "curve.csv", "record.json", "state/last.pt"
CURVE_COLUMNS = ("step", "lr", "loss", "train_iou", "held_out_iou", "cpu_s", "duration_s")

_SCENES_AT_END = 128
_SHAPES_AT_END = 256


def load_section(path: Path | None, overrides: Sequence[str] = ()) -> PretrainSection:
    """The settings of a file that has one section, ``pretrain``.

    Parameters
    ----------
    path : Path, optional
        The defaults where absent.
    overrides : sequence of str
        ``pretrain.key=value``.

    Raises
    ------
    ConfigError
        For an unknown key or a value that is not allowed.
    """
    data = apply_overrides({} if path is None else load_yaml(path), overrides)
    unknown = sorted(set(data) - {"pretrain"})
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]}", path=path, remedy="The only section here is pretrain.")
    try:
        section = PretrainSection.model_validate(data.get("pretrain") or {})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, ('pretrain', *e['loc'])))}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise ConfigError(problems, path=path, remedy="See pipelines/pretrain_nano.yaml.") from error
    if section.seed == HELD_OUT_SEED:
        raise ConfigError(
            f"pretrain.seed {HELD_OUT_SEED} is that of the held-out shapes", path=path, remedy="Take another seed."
        )
    return section


def pretrain_nano(folder: Path, section: PretrainSection, device: str = "auto", resume: bool = True) -> Path:
    """Train vit_nano and write its weights; the same settings are not trained twice.

    Parameters
    ----------
    folder : Path
        Receives ``nano.safetensors`` (float16, a stock SAM state dict), ``curve.csv``, ``curve.svg``, ``record.json``
        and ``state/``.
    section : PretrainSection
    device : str
    resume : bool
        Go on from ``state/`` where it is of the same settings; False begins anew.

    Returns
    -------
    Path
        The weights.
    """
    weights, record = folder / WEIGHTS_FILE, folder / RECORD_FILE
    settings = section.model_dump(mode="json")
    if resume and weights.is_file() and record.is_file() and json.loads(record.read_text())["pretrain"] == settings:
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("pre-training vit_nano on %d batches of synthetic scenes", sum(c.steps for c in section.courses))
    if section.processes == 1:
        _train(folder, section, device, resume)
    else:
        check_gpus(section.processes, device, "pretrain.processes")
        arguments = {"folder": folder, "section": section, "device": device, "resume": resume}
        launch(_train, section.processes, arguments)
    return weights


def _train(folder: Path, section: PretrainSection, device: str, resume: bool) -> None:
    keep_freed_memory()
    with joined(device) as (group, own_device):
        _train_as(group, folder, section, own_device, resume)


def _train_as(group: Group, folder: Path, section: PretrainSection, device: str, resume: bool) -> None:
    # On grids as small as these keeping N x N matrices takes less time than computing them again.
    sam = build("vit_nano", "random", section.image_size, section.seed, attention="reference")
    sam.to(choose_device(device))
    courses = [Course(**course.model_dump()) for course in section.courses]
    recipe = Recipe(courses, section.lr, section.weight_decay, section.seed)
    optimiser = new_optimiser(sam, recipe)
    run = _Run(folder, section, sam, optimiser, recipe if group.is_main else None)
    first = run.resume() if resume else 1
    try:
        pretrain(sam, optimiser, recipe, first, "auto", run.note)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory ran out while pre-training",
            path=folder,
            remedy="Lower pictures or sizes of pretrain.courses, or pretrain.processes.",
        ) from error
    if group.is_main:
        run.finish()


class _Run:
    """What is kept of a run while it goes on: its curve and its state."""

    def __init__(
        self,
        folder: Path,
        section: PretrainSection,
        sam: SamModel,
        optimiser: torch.optim.Optimizer,
        recipe: Recipe | None,
    ) -> None:
        self.folder = folder
        self.section = section
        self.sam = sam
        self.optimiser = optimiser
        self.recipe = recipe
        self.ends: list[dict[str, Tensor]] = []
        self.rows: list[dict[str, Any]] = []
        self.recent: list[tuple[float, float]] = []
        # Of this process; the others of a run take as much again.
        self.before = {"cpu_s": 0.0, "duration_s": 0.0}
        self.started = {"cpu_s": time.process_time(), "duration_s": time.perf_counter()}
        self.settings = section.model_dump(mode="json")

    def resume(self) -> int:
        """Take up the saved state where there is one of these settings; the step to go on with."""
        path = self.folder / STATE_FILE
        if not path.is_file():
            return 1
        state = load_state(path)
        if state["settings"] != self.settings:
            logger.info("%s is of other settings: beginning anew", path)
            return 1
        self.sam.load_state_dict(state["sam"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.rows, self.before, self.ends = state["rows"], state["spent"], state["ends"]
        logger.info("going on behind step %d", state["step"])
        return int(state["step"]) + 1

    def note(self, step: int, loss: float, iou: float) -> None:
        """Called after each step."""
        if self.recipe is None:
            return
        self.recent.append((loss, iou))
        if step in self.recipe.ends[-self.section.averaged :]:
            self.ends.append({name: tensor.detach().cpu().clone() for name, tensor in self.sam.state_dict().items()})
        if step % self.section.validate_every and step not in self.recipe.ends:
            return
        mean = [sum(values) / len(values) for values in zip(*self.recent, strict=True)]
        self.recent.clear()
        self.sam.eval()
        held_out = float(shape_iou(self.sam, self.section.validate_shapes).mean())
        spent = self.spent()
        row = {"step": step, "lr": self.optimiser.param_groups[0]["lr"], "loss": mean[0], "train_iou": mean[1]}
        self.rows.append(row | {"held_out_iou": held_out} | spent)
        logger.info(
            "step %d of %d: loss %.3f, IoU %.3f, of held-out shapes %.3f, %.0f s",
            *(step, self.recipe.steps, *mean, held_out, spent["duration_s"]),
        )
        write_table(self.folder / CURVE_FILE, CURVE_COLUMNS, self.rows)
        (self.folder / STATE_FILE).parent.mkdir(exist_ok=True)
        save_state(
            self.folder / STATE_FILE,
            {
                "settings": self.settings,
                "step": step,
                "sam": self.sam.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "rows": self.rows,
                "ends": self.ends,
                "spent": spent,
            },
        )

    def spent(self) -> dict[str, float]:
        """CPU and wall time so far, those of interrupted runs with it."""
        now = {"cpu_s": time.process_time(), "duration_s": time.perf_counter()}
        return {name: self.before[name] + now[name] - self.started[name] for name in now}

    def finish(self) -> None:
        """Write the weights, what they reach as they are stored, and the curve."""
        path = self.folder / WEIGHTS_FILE
        # Minima along one training lie about a better one (Izmailov et al. 2018, stochastic weight averaging).
        mean = {name: torch.stack([end[name] for end in self.ends]).mean(dim=0) for name in self.ends[0]}
        self.sam.load_state_dict(mean)
        write_weights(path, self.sam)
        stored = build("vit_nano", str(path), self.section.image_size).to(self.sam.pixel_mean.device)
        scores: dict[str, float] = scene_iou(stored, _SCENES_AT_END)
        scores["shapes_box"] = float(shape_iou(stored, _SHAPES_AT_END).mean())
        write_json(
            self.folder / RECORD_FILE,
            run_record()
            | {
                "notice": MODELS["vit_nano"].notice,
                "pretrain": self.settings,
                "sha256": sha256_of(path),
                "bytes": path.stat().st_size,
                "parameters": sum(p.numel() for p in self.sam.parameters()),
                "held_out_seed": HELD_OUT_SEED,
                "held_out_iou": scores,
                "processes": self.section.processes,
                **self.spent(),
            },
        )
        draw_curve(self.folder / "curve.svg", self.rows)
        logger.info("held-out IoU: %s", ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def write_weights(path: Path, sam: SamModel) -> None:
    """Write a model's tensors as float16 safetensors; the file itself says what it is for.

    Parameters
    ----------
    path : Path
    sam : SamModel
    """
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in sam.state_dict().items()}
    # One entry alone: safetensors writes several in an order that differs from call to call, and with it the hash.
    write_bytes_atomically(path, save(tensors, {"notice": str(MODELS["vit_nano"].notice)}))


def draw_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw IoU in training and of held-out shapes over the steps.

    Parameters
    ----------
    path : Path
        The suffix gives the format.
    rows : sequence of mapping
        Of ``curve.csv``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["train_iou"] for row in rows], label="training scenes, shaken boxes", color="0.55")
    axes.plot(steps, [row["held_out_iou"] for row in rows], label="held-out shapes, exact box", color="tab:blue")
    axes.set(xlabel="step", ylabel="mean IoU", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)
    plt.close(figure)
