"""What the configuration of an exported MONAI bundle refers to: its network, and inference over a manifest's cases."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from medsam_lora.config import DataConfig, PredictConfig
from medsam_lora.errors import AdapterError, ConfigError, DataError, MedsamLoraError
from medsam_lora.inference import postprocess
from medsam_lora.inference.predictor import PredictOptions
from medsam_lora.io.manifest import read_manifest
from medsam_lora.labels import label_map_of
from medsam_lora.models import MODELS
from medsam_lora.models.assemble import segmenter_of
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.progress import track
from medsam_lora.prompts import BOX_TABLE, NO_PROMPT, REFERENCE_BOX
from medsam_lora.prompts.sources import read_box_table, write_box_table
from medsam_lora.records import SliceBox
from medsam_lora.stages.case_boxes import check_prompts
from medsam_lora.stages.predict import chosen_cases, predict_case, task_of
from medsam_lora.stages.record import run_record, write_json

logger = logging.getLogger(__name__)

DESCRIPTION: Final = "configs/adapter.json"
WEIGHTS: Final = "models/model.pt"


class BundleNetwork(nn.Module):
    """A whole segmenter, base model and adaptation, whose state dict needs no other file.

    Parameters
    ----------
    adapter : str or Path
        ``configs/adapter.json``: what the adapter file said of itself. The weights are random until a state dict is
        loaded.
    """

    def __init__(self, adapter: str | Path) -> None:
        super().__init__()
        path = Path(adapter)
        try:
            self.metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"not the description of a bundle ({error})", path=path, remedy="Set --bundle_root to its folder."
            ) from error
        self.segmenter = whole(segmenter_of(self.metadata, path, "random"))
        self.eval()

    def forward(self, image: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Fused logits of slices.

        Parameters
        ----------
        image : Tensor of float32, shape (B, M, X, Y) or (B, depth * M, X, Y)
            Cropped, z-scored slices, background exactly 0. Where the method looks at stacks, the modalities of the
            first slice come first.
        boxes : Tensor of float, shape (B, n, 4), optional
            (i0, j0, i1, j1) on voxel edges of the crop; the whole plane by default.

        Returns
        -------
        Tensor of float32, shape (B, R, X, Y)
            Tumour where above 0.
        """
        depth = self.segmenter.adaptation.report.depth
        z = image if depth == 1 else image.unflatten(1, (depth, -1))
        if boxes is None:
            boxes = image.new_tensor([[[0, 0, *image.shape[-2:]]]]).expand(len(image), -1, -1)
        logits: Tensor = self.segmenter(z, list(boxes.detach().cpu().numpy().astype(np.float32))).logits
        return logits


def whole(segmenter: Segmenter) -> Segmenter:
    """Make every buffer part of the state dict, those too that follow from the base weights, which are not there.

    Parameters
    ----------
    segmenter : Segmenter
        Changed in place.
    """
    for module in segmenter.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer, persistent=True)
    return segmenter


def loaded(network: BundleNetwork, checkpoint: str | Path, device: torch.device | str = "cpu") -> BundleNetwork:
    """A network with the weights of ``models/model.pt``, strictly, on a device and in evaluation mode.

    Raises
    ------
    AdapterError
        Where the file is not there, or holds other tensors.
    """
    path = Path(checkpoint)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except (OSError, RuntimeError) as error:
        raise AdapterError(
            f"not the weights of this bundle ({str(error).splitlines()[0]})",
            path=path,
            remedy="Copy the whole bundle again, or export it anew.",
        ) from error
    return network.to(torch.device(device)).eval()


class CaseEvaluator:
    """Prediction of a manifest's cases, as ``medsam-lora predict`` does it.

    Parameters
    ----------
    network : BundleNetwork
        With its weights.
    manifest : str
        CSV of cases.
    output_dir : str
        Receives ``<case_id>.nii.gz``, ``<case_id>.seg.nrrd``, ``prompts.csv`` and ``record.json``.
    root : str, optional
        Data root of the manifest's paths; its own folder by default.
    boxes : str, optional
        CSV of box prompts (case_id,k,i0,j0,i1,j1, native frame); from the reference by default.
    split : str, optional
        Only the cases of this split.
    settings : dict, optional
        `PredictConfig`: ``batch_size``, ``amp``, ``threshold``; ``prompts``, of which ``none`` predicts every slice
        that shows brain, where the method goes by no prompts.
    """

    def __init__(
        self,
        network: BundleNetwork,
        manifest: str,
        output_dir: str,
        root: str | None = None,
        boxes: str | None = None,
        split: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.manifest, self.out = Path(manifest), Path(output_dir)
        self.root = self.manifest.parent if root is None else Path(root)
        self.boxes = None if boxes is None else Path(boxes)
        self.split = split
        self.settings = PredictConfig.model_validate(settings or {})

    def run(self) -> list[str]:
        """Predict the cases, one after the other.

        Returns
        -------
        list of str
            The ids of those that were predicted.

        Raises
        ------
        MedsamLoraError
            Before the first case, where manifest, boxes or settings cannot be used; after the last one, where some
            failed.
        """
        settings, network = self.settings, self.network
        prompted = settings.prompts == "boxes"
        if self.boxes is not None and not prompted:
            raise ConfigError("a table of boxes was given beside prompts: none", remedy="Leave one of them out.")
        check_prompts(settings.prompts, network.metadata["method"])
        records = chosen_cases(read_manifest(self.manifest), self.split, self.manifest)
        given = None if self.boxes is None else read_box_table(self.boxes)
        options = PredictOptions(settings.batch_size, settings.amp, settings.threshold)
        max_bytes = int(DataConfig().max_gib * 2**30)
        task = task_of(network.segmenter, network.metadata, self.root, self.out, options, max_bytes, prompted)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "record.json", self._record([r.case_id for r in records]))
        used: dict[str, list[SliceBox]] = {}
        failed: list[str] = []
        for record in track(records, "predict"):
            mine = None if given is None else given.get(record.case_id, [])
            try:
                used[record.case_id] = predict_case(task, record, mine)
            except MedsamLoraError as error:
                failed.append(record.case_id)
                logger.error("%s", error)
        write_box_table(self.out / "prompts.csv", used)
        if failed:
            raise DataError(
                f"{len(failed)} of {len(records)} cases failed ({', '.join(failed[:5])}), the others are in {self.out}",
                path=self.manifest,
                remedy="See the errors above.",
            )
        return list(used)

    def _record(self, case_ids: list[str]) -> dict[str, Any]:
        metadata, segmenter = self.network.metadata, self.network.segmenter
        _, meanings = label_map_of(np.zeros((len(segmenter.regions), 1, 1, 1), bool), segmenter.regions)
        notice = MODELS[metadata["model_name"]].notice
        boxed = REFERENCE_BOX if self.boxes is None else BOX_TABLE
        return {
            **run_record(),
            **({} if notice is None else {"notice": notice}),
            "stage": "predict",
            "run": f"bundle of {metadata['method']}",
            "method": metadata["method"],
            "prompt_source": boxed if self.settings.prompts == "boxes" else NO_PROMPT,
            "regions": list(segmenter.regions),
            "labels": {str(value): name for value, name in meanings.items()},
            "postprocess": postprocess.describe(postprocess.from_json(metadata.get("postprocess", {}))),
            "modalities": list(segmenter.modalities),
            "cases": case_ids,
            "adapter_content_sha256": metadata["content_sha256"],
            "base_sha256": metadata["base_sha256"],
            "predict": self.settings.model_dump(mode="json"),
        }
