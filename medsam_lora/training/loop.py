"""The training loop.

Every random choice is a function of (seed, epoch, index), so a state holds no generator and a run that was stopped
goes on bit for bit (on the CPU; on CUDA as far as its kernels are deterministic).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medsam_lora.config import TrainConfig
from medsam_lora.errors import TrainingError
from medsam_lora.inference.predictor import PredictOptions, validate_case
from medsam_lora.models.compiling import compiled_blocks
from medsam_lora.models.embedding_cache import Found
from medsam_lora.models.precision import autocast, float32_products, resolve_amp
from medsam_lora.models.segmenter import N_TOKENS, Segmenter
from medsam_lora.progress import track
from medsam_lora.records import PreparedSlices
from medsam_lora.training.dataset import Batch, SliceDataset, epoch_order, plan_batches
from medsam_lora.training.distributed import Group
from medsam_lora.training.early_stopping import EarlyStopping
from medsam_lora.training.guards import deterministic, graceful_interrupt
from medsam_lora.training.log import train_row
from medsam_lora.training.losses import LossWeights, hard_iou, segmentation_loss
from medsam_lora.training.optimiser import build_optimiser, schedule_factor
from medsam_lora.training.prefetch import prefetched
from medsam_lora.training.state import load_state, save_state

logger = logging.getLogger(__name__)

ALL_TOKENS = tuple(range(N_TOKENS))


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; its state is saved."""


@dataclass
class Progress:
    """Where a run stands; saved whole.

    Parameters
    ----------
    epoch : int
        Current epoch, from 1.
    position : int
        Batches of it that are done.
    sums : dict of str to float
        Running sums of the epoch's log.
    rows : list of dict
        Finished rows of ``log.csv``.
    """

    epoch: int = 1
    position: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains the declared parameters of a segmenter.

    Parameters
    ----------
    segmenter : Segmenter
    dataset : SliceDataset
        Training slices.
    validation : sequence of PreparedSlices
        Whole validation cases; may be empty where ``options.select`` is ``last``.
    options : TrainConfig
    state_path : Path
    identity : str
        Hash of everything that must be equal for a state to be resumed (configuration, data, base weights).
    group : Group, optional
        The processes that share every batch; this one alone by default.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        dataset: SliceDataset,
        validation: Sequence[PreparedSlices],
        options: TrainConfig,
        state_path: Path,
        identity: str,
        group: Group | None = None,
    ) -> None:
        self.segmenter = segmenter
        self.group = Group() if group is None else group
        self.called = self.group.wrapped(segmenter, segmenter.device)
        self.dataset = dataset
        self.validation = list(validation)
        self.options = options
        self.state_path = state_path
        self.identity = identity
        self.progress = Progress()
        self.stopping = EarlyStopping(options.patience)
        self.best_state: dict[str, torch.Tensor] | None = None
        # One for all validations: it remembers the batch that fitted, where memory ran out.
        self.predicting = PredictOptions(options.batch_size, options.amp)
        self.weights = LossWeights(options.dice_weight, options.bce_weight, options.focal_share, options.focal_gamma)
        self.optimiser = build_optimiser(segmenter, options)
        segmenter.sam.image_encoder.checkpointing = options.checkpointing  # type: ignore[assignment]
        self.scaler = torch.amp.GradScaler(
            segmenter.device.type, enabled=resolve_amp(options.amp, segmenter.device) == "fp16"
        )
        n_items = options.slices_per_epoch or len(dataset)
        # Slices of several shapes make a few batches more than this; the schedule then reaches its end a little early.
        self.steps_per_epoch = math.ceil(math.ceil(n_items / options.batch_size) / options.accumulation)

    # ---------------------------------------------------------------- run
    def fit(self, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
        """Train to the end and leave the chosen weights in the segmenter.

        Parameters
        ----------
        on_epoch : callable, optional
            Called with each finished log row.

        Returns
        -------
        list of dict
            The rows of ``log.csv``.

        Raises
        ------
        Interrupted
            After Ctrl-C; the state is saved.
        TrainingError
            Where the loss is not finite.
        """
        device = self.segmenter.device
        with (
            deterministic(),
            float32_products(device, self.options.amp),
            compiled_blocks(self.options.compile),
            graceful_interrupt() as interrupted,
        ):
            if self.progress.epoch == 1 and self.progress.position == 0 and not self.progress.rows:
                self._finish_epoch(0, time.perf_counter(), on_epoch)
            # A run that had stopped early and is taken up again has nothing left to do.
            while self.progress.epoch <= self.options.epochs and not self.stopping.exhausted(self.progress.epoch - 1):
                started = time.perf_counter()
                self._run_epoch(interrupted)
                self._finish_epoch(self.progress.epoch, started, on_epoch)
                stop = self.stopping.exhausted(self.progress.epoch)
                self.progress = Progress(self.progress.epoch + 1, rows=self.progress.rows)
                self._save()
                if stop:
                    logger.info("no better validation Dice for %d epochs: stopped", self.options.patience)
                    break
        if self.options.select == "best" and self.best_state is not None:
            self.segmenter.load_adapter_state(self.best_state)
        return self.progress.rows

    def _run_epoch(self, interrupted: Callable[[], bool]) -> None:
        options, progress = self.options, self.progress
        started = time.perf_counter()
        order = epoch_order(len(self.dataset), options.seed, progress.epoch, options.slices_per_epoch)
        batches = plan_batches(order, [self.dataset.shape(i) for i in order], options.batch_size)
        self.segmenter.train()
        steps = range(progress.position, len(batches), options.accumulation)
        loaded = prefetched(self._load, batches[progress.position :])
        for first in track(steps, f"epoch {progress.epoch}/{options.epochs}"):
            group = batches[first : first + options.accumulation]
            self._set_rates(progress.epoch, first // options.accumulation)
            self.optimiser.zero_grad(set_to_none=True)
            n_slices = sum(len(b) for b in group)
            for offset, items in enumerate(group):
                last = offset == len(group) - 1
                with nullcontext() if last else self.group.unsynchronised(self.called):
                    self._forward_backward(next(loaded), len(items), n_slices, first + offset)
            self._update()
            progress.position += len(group)
            # Only between updates, so that accumulated gradients need not be saved.
            if self.group.any(interrupted()):
                self._add("seconds", time.perf_counter() - started)
                self._save()
                raise Interrupted(f"stopped in epoch {progress.epoch}; its state is saved in {self.state_path}")

    def _load(self, items: list[int]) -> tuple[Batch, int, Found | None]:
        """The part of this process of a batch, how many of its slices count, and what the cache has of them.

        Of a batch too small for all processes none count.
        """
        own = self.group.share(items)
        # A process without a slice of its own must take part all the same, or the others would wait for it.
        batch = self.dataset.batch(own or items[:1], (self.options.seed, self.progress.epoch), self.options.flip)
        ahead = None if self.segmenter.cache is None else self.segmenter.read_ahead(batch.z)
        return batch.pinned() if self.segmenter.device.type == "cuda" else batch, len(own), ahead

    def _forward_backward(
        self, loaded: tuple[Batch, int, Found | None], n_batch: int, n_slices: int, position: int
    ) -> None:
        options, device = self.options, self.segmenter.device
        batch, n, ahead = loaded
        batch = batch.to(device)
        # Dropout alone draws from torch's global generator: give it one of its own and put the old one back.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_draw_seed(options.seed, self.progress.epoch, position, *self._own_draw()))
            with autocast(device, options.amp):
                output = self.called(batch.z, batch.boxes, tokens=ALL_TOKENS, ahead=ahead)
        target = batch.masks[:, self.segmenter.token_regions]
        terms = segmentation_loss(output.logits, output.iou, target, self.segmenter.main_tokens, self.weights)
        # The mean over the slices of the update; the processes' gradients are averaged, not added.
        self.scaler.scale(terms.total * (n * self.group.size / n_slices)).backward()
        with torch.no_grad():
            main = output.logits[:, self.segmenter.main_tokens]
            reference = target[:, self.segmenter.main_tokens].float()
            iou = hard_iou(main, reference)
            found = {
                "loss": terms.total * n,
                "loss_dice": terms.dice * n,
                "loss_bce": terms.bce * n,
                "loss_focal": terms.focal * n,
                "loss_iou": terms.iou * n,
                "train_dice": (2 * iou / (1 + iou)).mean(dim=1).sum(),
                "predicted_voxels": (main > 0).sum(),
                "reference_voxels": reference.sum(),
            }
            # Read from the device once, with the backward pass on its way; in float64, which counts every voxel.
            values = torch.stack([value.double() for value in found.values()]).tolist()
            sums = dict(zip(found, values, strict=True))
        if not math.isfinite(sums["loss"]):
            # No update has seen it.
            raise TrainingError(
                f"the loss is {sums['loss']} in epoch {self.progress.epoch}",
                remedy="Lower train.lr, or train in train.amp=none or bf16.",
            )
        everyone = self.group.total(sums if n else dict.fromkeys(sums, 0.0))
        for name, value in everyone.items():
            self._add(name, value)
        self._add("slices", n_batch)

    def _own_draw(self) -> tuple[int, ...]:
        # Processes drop out differently, one alone as ever.
        return (self.group.rank,) if self.group.size > 1 else ()

    def _update(self) -> None:
        self.scaler.unscale_(self.optimiser)
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.options.clip_norm or math.inf)
        length = float(norm)
        # In fp16 an update whose gradients overflow is left out by the scaler, which then scales less.
        if math.isfinite(length) or not self.scaler.is_enabled():
            self._add("grad_norm", length)
            self._add("updates", 1)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _set_rates(self, epoch: int, step: int) -> None:
        done = (epoch - 1) * self.steps_per_epoch + step
        factor = schedule_factor(done, self.options.epochs * self.steps_per_epoch, self.options)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor

    # ---------------------------------------------------------------- log
    def _finish_epoch(self, epoch: int, started: float, on_epoch: Callable[[dict[str, Any]], None] | None) -> None:
        # What an epoch took before it was interrupted belongs to it.
        duration = time.perf_counter() - started + self.progress.sums.get("seconds", 0.0)
        row = train_row(epoch, self.progress.sums, self.optimiser, self.segmenter, duration) if epoch else {"epoch": 0}
        due = epoch % self.options.validate_every == 0 or epoch == self.options.epochs
        if self.validation and due:
            # Whole cases to one process; all processes know every score, and so choose and stop alike.
            own = [(n, self._validate(self.validation[n])) for n in self.group.share(range(len(self.validation)))]
            known = {n: score for part in self.group.gathered(own) for n, score in part}
            scores = [known[n] for n in sorted(known)]
            row["val_dice"] = sum(s.dice for s in scores) / len(scores)
            row["val_area_ratio"] = sum(s.area_ratio for s in scores) / len(scores)
            # Epoch 0 is the base model: training that never beats it should keep it, and say so.
            if self.stopping.update(epoch, row["val_dice"]) and self.options.select == "best":
                self.best_state = {k: v.clone().cpu() for k, v in self.segmenter.adapter_state().items()}
        self.progress.rows.append(row)
        if on_epoch is not None:
            on_epoch(row)

    def _validate(self, case: PreparedSlices) -> Any:
        prompts = self.dataset.prompts
        return validate_case(self.segmenter, case, prompts.kind, prompts.min_voxels, self.predicting)

    def _add(self, name: str, value: float) -> None:
        self.progress.sums[name] = self.progress.sums.get(name, 0.0) + float(value)

    # ---------------------------------------------------------------- state
    def _save(self) -> None:
        if not self.group.is_main:
            return
        save_state(
            self.state_path,
            {
                "identity": self.identity,
                "progress": asdict(self.progress),
                "stopping": asdict(self.stopping),
                "adapter": self.segmenter.adapter_state(),
                "best": self.best_state,
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        )

    def resume(self) -> None:
        """Take up the saved state.

        Raises
        ------
        TrainingError
            Where there is none, or it belongs to another configuration, data set or base model.
        """
        state = load_state(self.state_path)
        if state["identity"] != self.identity:
            raise TrainingError(
                f"the state was saved by a run with other settings, data or weights ({state['identity'][:12]} there, "
                f"{self.identity[:12]} here)",
                path=self.state_path,
                remedy="Resume with the configuration, manifest and weights it was started with, or train anew.",
            )
        self.segmenter.load_adapter_state(state["adapter"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.stopping = EarlyStopping(**state["stopping"])
        self.best_state = state["best"]


def _draw_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
