"""What all checks look at: a few slices of the user's data, the settings, and a segmenter made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsam_lora.config import Config, MethodConfig
from medsam_lora.inference.predictor import PredictOptions, predict_slices, reference_boxes
from medsam_lora.io.case import read_case
from medsam_lora.labels import region_mask
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.records import CaseRecord, CaseVolumes, PreparedSlices
from medsam_lora.stages import train as train_stage
from medsam_lora.training.dataset import Batch, PromptOptions, SliceDataset
from medsam_lora.training.loop import Trainer

CONSTANT: Mapping[str, Any] = {
    "accumulation": 1,
    "slices_per_epoch": None,
    "flip": False,
    "schedule": "constant",
    "select": "last",
    "patience": None,
    "processes": 1,
    "tensorboard": False,
}
"""Settings of ``train`` that the few updates of a check are made with, whatever the user's are."""

HALF = 0.5
"""The threshold of checks that ask for frames and inputs: at another one an edge of grey moves and a base model marks
less or more, which is the user's choice and no fault."""


def tumour_of(case: PreparedSlices) -> np.ndarray:
    """Where the first slice of a case shows tumour: bool, shape (X, Y)."""
    assert case.label is not None
    return region_mask(np.asarray(case.label[0]), "WT")


@dataclass
class Subject:
    """The slices and settings under examination, and what the checks have made of them so far.

    Parameters
    ----------
    config : Config
    device : torch.device
    work : Path
        A folder for what the stages write; deleted afterwards.
    store : Path
        The prepared store that the slices are of.
    whole : mapping of str to PreparedSlices
        The cases of the slices, as stored.
    slices : sequence of PreparedSlices
        One slice each.
    records : mapping of str to CaseRecord
        Lines of the manifest of these cases; empty where only a store was given.
    root : Path
        Data root of the records.
    run : Path, optional
        A trained run to be examined as well.
    steps : int
        Most updates of an attempt to overfit.
    minutes : float
        Most minutes of the same.
    """

    config: Config
    device: torch.device
    work: Path
    store: Path
    whole: Mapping[str, PreparedSlices]
    slices: Sequence[PreparedSlices]
    records: Mapping[str, CaseRecord] = field(default_factory=dict)
    root: Path = Path()
    run: Path | None = None
    steps: int = 150
    minutes: float = 10.0
    updates: int = 0

    @cached_property
    def segmenter(self) -> Segmenter:
        """The segmenter that is examined, and trained on the way from check to check."""
        return self.fresh()

    def fresh(self, **method: Any) -> Segmenter:
        """A segmenter as training begins with; settings of the method may be changed."""
        config = self.config
        changed = MethodConfig.model_validate(config.method.model_dump() | method)
        return build_segmenter(
            config.model,
            changed,
            config.fusion,
            config.data.modalities,
            config.train.regions,
            config.train.seed,
            self.device,
        )

    @property
    def options(self) -> PredictOptions:
        """How slices are predicted where results are compared: in float32."""
        return self.options_at(None)

    def options_at(self, threshold: float | None) -> PredictOptions:
        """As `options`, with another threshold than the user's where one is given."""
        own = self.config.predict
        return PredictOptions(own.batch_size, "none", own.threshold if threshold is None else threshold)

    def dataset(self, segmenter: Segmenter, cases: Sequence[PreparedSlices] | None = None) -> SliceDataset:
        """The slices as training reads them, with exact boxes."""
        prompts = PromptOptions(self.config.prompt.boxes, self.config.prompt.min_component_voxels, 0.0)
        chosen = self.slices if cases is None else cases
        depth = segmenter.adaptation.report.depth
        return SliceDataset(chosen, segmenter.regions, prompts, segmenter.sam.image_size, depth)

    def batches(self, segmenter: Segmenter) -> list[Batch]:
        """Every slice as a training batch of its own, on the device; their crops need not be of one shape."""
        dataset = self.dataset(segmenter)
        return [dataset.batch([item]).to(segmenter.device) for item in range(len(dataset))]

    def trainer(self, segmenter: Segmenter, *, epochs: int, repeats: int = 1, **changes: Any) -> Trainer:
        """The training loop over the slices.

        Parameters
        ----------
        segmenter : Segmenter
        epochs : int
        repeats : int
            How often an epoch has each slice.
        **changes
            Settings of ``train`` over the user's and `CONSTANT`.
        """
        options = self.config.train.model_copy(update={**CONSTANT, "validate_every": epochs, **changes})
        options = options.model_copy(update={"epochs": epochs})
        dataset = self.dataset(segmenter, list(self.slices) * repeats)
        return Trainer(segmenter, dataset, [], options, self.work / "state.pt", "doctor")

    def boxes(self, case: PreparedSlices) -> dict[int, np.ndarray]:
        """The reference's boxes of a case as prediction has them."""
        return reference_boxes(case, self.config.prompt.boxes, self.config.prompt.min_component_voxels)

    def predicted(self, segmenter: Segmenter, threshold: float | None = None) -> list[np.ndarray]:
        """Masks of bool, shape (R, X, Y), of every slice, by the prediction's own path."""
        return [self.predicted_of(segmenter, case, threshold) for case in self.slices]

    def predicted_by_base(self, threshold: float | None = None) -> list[np.ndarray]:
        """As `predicted`, with the adaptation switched off."""
        with self.segmenter.adaptation.disable():
            return self.predicted(self.segmenter, threshold)

    def predicted_of(self, segmenter: Segmenter, case: PreparedSlices, threshold: float | None = None) -> np.ndarray:
        """As `predicted`, of one slice; at the user's threshold unless another is given."""
        return predict_slices(segmenter, case, self.boxes(case), self.options_at(threshold))[0]

    @torch.no_grad()
    def logits(self, segmenter: Segmenter) -> list[Tensor]:
        """Logits of every slice as the segmenter stands (its mode is left alone), shape (R, X, Y), on the CPU."""
        return [segmenter(batch.z, batch.boxes).logits[0].float().cpu() for batch in self.batches(segmenter)]

    def volumes(self, case_id: str) -> CaseVolumes:
        """A case read from its own files; the last one is kept."""
        return self._read(case_id)

    @cached_property
    def _read(self) -> Any:
        data = self.config.data

        def read(case_id: str) -> CaseVolumes:
            return read_case(
                self.records[case_id],
                self.root,
                data.modalities,
                max_bytes=int(data.max_gib * 2**30),
                nonfinite=data.nonfinite,
            )

        return lru_cache(maxsize=1)(read)

    @cached_property
    def adapter(self) -> Path:
        """The segmenter's adapter file, written as ``train`` writes it, after two updates at least."""
        if not self.updates and self.segmenter.trainable_groups():
            self.trainer(self.segmenter, epochs=2, slices_per_epoch=1).fit()
            self.updates = 2
        self.segmenter.eval()
        path = self.work / "run" / train_stage.ADAPTER_FILE
        metadata = train_stage.run_metadata(self.segmenter, self.config, self.store)
        train_stage.save_adapter(path, self.segmenter.adapter_state(), metadata)
        return path
