"""Whether what is written is what was trained: the adapter read back, merged, and used by the stage ``predict``."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from medsam_lora.doctor.frames import slice_of
from medsam_lora.doctor.result import Result, fault, ok, skipped
from medsam_lora.doctor.sources import adapter_of, cut
from medsam_lora.doctor.start import filled_boxes
from medsam_lora.doctor.subject import Subject, tumour_of
from medsam_lora.inference import postprocess
from medsam_lora.inference.predictor import predict_slices
from medsam_lora.inference.volume import to_native
from medsam_lora.io.manifest import write_manifest
from medsam_lora.labels import SNFH
from medsam_lora.models.assemble import build_segmenter, load_segmenter
from medsam_lora.models.checkpoint import load_adapter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.prompts.sources import reference_boxes, write_box_table
from medsam_lora.records import PreparedSlices
from medsam_lora.stages import adapters, predict
from medsam_lora.stages import train as train_stage
from medsam_lora.stages.case_boxes import check_prompts
from medsam_lora.transforms.stages import PreparePlan

REREAD = 1e-5
"""Largest difference of logits, relative to the largest, of an adapter read back; on one machine it is 0."""
MERGED = 1e-4
"""The same of merged weights: sums in another order."""
VOXELS = 0.005
"""Share of the marked voxels that may differ between two ways to the same mask: rounding at the threshold."""


def reload(subject: Subject) -> Result:
    """Whether the adapter file gives the trained model, and train() and eval() leave the weights alone."""
    segmenter = subject.segmenter
    path = subject.adapter
    before = {name: t.clone() for name, t in segmenter.sam.state_dict().items()}
    changed: list[str] = []
    for mode in (True, False):
        segmenter.train(mode)
        changed += [n for n, t in segmenter.sam.state_dict().items() if not torch.equal(t, before[n])]
    changed = list(dict.fromkeys(changed))
    expected = subject.logits(segmenter)
    again, _ = load_segmenter(path, subject.config.model.weights, subject.device)
    difference = _difference(subject.logits(again), expected)
    measured = (
        f"{path.stat().st_size / 2**20:.2f} MiB written and read back: logits differ by {difference:.1e} of the "
        f"largest; {len(changed)} tensors changed by train() and eval()"
    )
    numbers = {"difference": difference, "changed_by_modes": changed}
    if changed:
        return fault(
            measured,
            f"Changing between training and evaluation edits weights ({changed[0]} first): LoRA is merged into them in "
            "place, and what is saved or evaluated then is not what was trained.",
            "Never merge on eval() (merge_weights=False); merge only into a new file.",
            **numbers,
        )
    if not difference <= REREAD:
        return fault(
            measured,
            "The model read back is not the one trained: tensors are missing from the file, are not loaded, or are "
            "applied twice.",
            "Save every trained tensor, load strictly (no strict=False), and save unmerged.",
            **numbers,
        )
    check = train_stage.check_reloaded(segmenter, subject.slices, path.parent, subject.config, subject.device)
    dices = ", ".join(f"{dice:.3f}" for dice in check["dice"])
    return ok(f"{measured}; Dice {dices} again", **numbers, dice=check["dice"])


def merge(subject: Subject) -> Result:
    """Whether the adapter merged into a stock checkpoint computes the same, on the slices."""
    segmenter = subject.segmenter
    if not segmenter.adaptation.report.mergeable:
        return skipped(f"{subject.config.method.name} cannot be merged: it adds computation of its own")
    if segmenter.sam.grid != "padded":
        return skipped(f"a stock checkpoint does not compute the {segmenter.sam.grid} grid (model.grid)")
    path = subject.work / "merged.safetensors"
    path.unlink(missing_ok=True)
    record = adapters.merge(subject.adapter, path, subject.config.model.weights)
    config = subject.config
    model = config.model.model_copy(update={"weights": str(path), "image_size": segmenter.sam.image_size})
    plain = config.method.model_copy(update={"name": "zero_shot"})
    stock = build_segmenter(
        model, plain, config.fusion, segmenter.modalities, segmenter.regions, config.train.seed, subject.device
    )
    stock.fusion.load_state_dict(segmenter.fusion.state_dict())
    # Stock weights train nothing, whose regions go by area, but the merged ones may have learned them.
    stock.regions_by_area = segmenter.regions_by_area
    # Dropout and some fusions compute something else in training.
    stock.eval()
    segmenter.eval()
    difference = _difference(subject.logits(stock), subject.logits(segmenter))
    flipped = sum(
        int((a != b).sum()) for a, b in zip(subject.predicted(stock), subject.predicted(segmenter), strict=True)
    )
    measured = (
        f"logits of the merged checkpoint differ by {difference:.1e} of the largest on the slices "
        f"({record['largest_difference']:.1e} on a random image), {flipped} voxels of the masks"
    )
    numbers = {"difference": difference, "voxels": flipped}
    if not difference <= MERGED:
        return fault(
            measured,
            "The merged model computes something else than the adapted one.",
            "Keep the adapter file beside the base checkpoint, and do not use the merged one.",
            **numbers,
        )
    return ok(measured, **numbers)


def predicted(subject: Subject) -> Result:
    """Whether the stage ``predict`` writes, on the file's own grid, what the trained model says of the slices."""
    if not subject.records:
        return skipped("the files are not at hand", remedy="Give --manifest (and --root).")
    prompts = subject.config.predict.prompts
    check_prompts(prompts, subject.config.method.name)
    union = differing = 0
    written = _written(subject, subject.adapter, subject.work / "predictions", prompted=prompts == "boxes")
    for case_id, volume in written.items():
        case = _together(subject, case_id)
        masks = predict_slices(subject.segmenter, case, subject.boxes(case), subject.options)
        expected = to_native(masks[:, 0].astype(bool), case)
        where = slice_of(case)
        differing += int(((volume != expected) & where).sum()) + int((volume & ~where).sum())
        union += int((volume | expected).sum())
    share = differing / max(union, 1)
    measured = f"{differing} of {union} voxels written by predict differ from what the trained model says"
    measured += "" if prompts == "boxes" else ", with whole slices in place of the boxes"
    numbers = {"differing": differing, "voxels": union}
    if not union:
        return skipped(
            "neither predict nor the trained model marks a voxel of these slices: nothing can be compared",
            measured,
            "Look at the checks step and overfit: rates too high end in empty masks. Or give a trained run (--run).",
            **numbers,
        )
    if share > VOXELS:
        return fault(
            measured,
            "What predict writes is not what was validated: other weights, another preparation, or another way back to "
            "the file's grid.",
            "Look at the checks input, way_back and reload.",
            **numbers,
        )
    return ok(measured, **numbers)


def run(subject: Subject) -> Result:
    """A trained run: whether it reads back, knows this data's preparation, and predicts what it has predicted."""
    if subject.run is None:
        return skipped("no run was given (--run)")
    path = adapter_of(subject.run)
    tensors, metadata = load_adapter(path)
    segmenter, _ = load_segmenter(path, subject.config.model.weights, subject.device)
    held = segmenter.adapter_state()
    unlike = sorted(n for n, t in tensors.items() if n not in held or not torch.equal(t, held[n].cpu()))
    unlike += sorted(set(held) - set(tensors))
    plan = PreparePlan.from_json(metadata["plan"])
    first = subject.slices[0]
    apart = [
        name
        for name, ours, theirs in (
            ("modalities", tuple(first.modalities), tuple(metadata["modalities"])),
            ("intensity.voxels", first.voxels, plan.voxels),
            ("model.input_range", subject.segmenter.input_spec.to_json(), metadata["input_spec"]),
            ("train.regions", list(subject.segmenter.regions), list(metadata["regions"])),
        )
        if ours != theirs
    ]
    measured = f"{len(tensors)} tensors read back, {len(unlike)} of them unlike the file"
    numbers: dict[str, object] = {"tensors": len(tensors), "unlike": unlike, "settings_apart": apart}
    if unlike:
        return fault(measured, f"Not loaded as saved: {unlike[0]}.", "Load the adapter strictly, in place.", **numbers)
    if apart:
        return fault(
            measured,
            f"The run was trained with other settings than are given here: {', '.join(apart)}.",
            f"Use the run's own settings: --config {subject.run / 'config.yaml'}.",
            **numbers,
        )
    dices = [_dice(subject, segmenter, n) for n in range(len(subject.slices))]
    floors = [_overlap(filled_boxes(subject, c), tumour_of(c)) for c in subject.slices]
    measured += f"; Dice {np.mean(dices):.3f} on the slices, filled boxes {np.mean(floors):.3f}"
    numbers |= {"dice": dices, "floor": floors}
    if not subject.records:
        return ok(f"{measured}; the files are not at hand", **numbers)
    if any(how.changes for how in postprocess.from_json(metadata.get("postprocess", {})).values()):
        # What was removed or filled depends on the whole volume, of which only some slices are predicted here.
        return ok(f"{measured}; its predictions are cleaned up as whole volumes and not compared", **numbers)
    share, compared = _compared(subject, path, segmenter.adaptation.report.depth)
    measured += "" if share is None else f"; {share:.2%} of the voxels of {compared} earlier predictions differ now"
    numbers["differing_share"] = share
    if share is not None and share > VOXELS:
        return fault(
            measured,
            "The run's predictions are not what its adapter predicts now: they were made with other weights, boxes, "
            "settings, or another version.",
            "Predict again with this adapter before anything is scored.",
            **numbers,
        )
    return ok(measured, **numbers)


def _compared(subject: Subject, adapter: Path, depth: int) -> tuple[float | None, int]:
    """Share of voxels of the run's earlier predictions that differ now, on the slices; None where there are none."""
    assert subject.run is not None
    earlier = subject.run / "predictions"
    known = [c for c in subject.records if (earlier / f"{c}.nii.gz").is_file()]
    if not known or _prompt_source(earlier) != "reference_box":
        return None, 0
    union = differing = 0
    for case_id, volume in _written(subject, adapter, subject.work / "again", depth // 2).items():
        if case_id not in known:
            continue
        where = slice_of(_together(subject, case_id))
        old = _marked(earlier / f"{case_id}.nii.gz")
        if old.shape != volume.shape:
            return 1.0, len(known)
        differing += int(((volume != old) & where).sum())
        union += int(((volume | old) & where).sum())
    return differing / max(union, 1), len(known)


def _prompt_source(folder: Path) -> str:
    path = folder / "record.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("prompt_source")) if path.is_file() else ""


def _together(subject: Subject, case_id: str) -> PreparedSlices:
    """The slices of one case in one: a method that looks at neighbours sees them as the stage predict does."""
    whole = subject.whole[case_id]
    chosen = {case.ks[0] for case in subject.slices if case.case_id == case_id}
    return cut(whole, [n for n, k in enumerate(whole.ks) if k in chosen])


def _written(
    subject: Subject, adapter: Path, out: Path, reach: int = 0, prompted: bool = True
) -> dict[str, np.ndarray]:
    """What the stage predict writes of the slices, by case: where a voxel has any label, on the native grid.

    With `reach` so many slices on either side are predicted as well, as far as they show tumour. Where it is not
    `prompted` the boxes are those that the stage has then, around the whole slice.
    """
    _, metadata = load_adapter(adapter)
    kind, fewest = metadata["prompts"]["kind"], metadata["prompts"]["min_voxels"]
    boxes = {}
    for case_id in subject.records:
        volumes = subject.volumes(case_id)
        marked = slice_of(_together(subject, case_id), reach)
        assert volumes.label_map is not None
        shown = np.where(marked, volumes.label_map, 0) if prompted else marked * SNFH
        only = shown.astype(np.uint8)
        boxes[case_id] = reference_boxes(only, volumes.geometry, "WT", kind, fewest)
    manifest, table = subject.work / "examined.csv", subject.work / "boxes.csv"
    write_manifest(manifest, list(subject.records.values()))
    write_box_table(table, boxes)
    # In float32, as what it is compared with, and of these slices alone, which takes a table of boxes; everything else
    # as the user predicts.
    changes = {"amp": "none", "prompts": "boxes"}
    config = subject.config.model_copy(update={"predict": subject.config.predict.model_copy(update=changes)})
    outcome = predict.predict(manifest, subject.root, adapter, out, config, boxes=table, device=str(subject.device))
    return {case_id: _marked(out / f"{case_id}.nii.gz") for case_id in outcome.done}


def _marked(path: Path) -> np.ndarray:
    return np.asarray(nib.nifti1.Nifti1Image.from_filename(path).dataobj) > 0


def _dice(subject: Subject, segmenter: Segmenter, number: int) -> float:
    case = subject.slices[number]
    return _overlap(subject.predicted_of(segmenter, case)[0], tumour_of(case))


def _overlap(mask: np.ndarray, reference: np.ndarray) -> float:
    return float(2 * (mask & reference).sum() / max(mask.sum() + reference.sum(), 1))


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of logits relative to the largest logit."""
    scale = max(float(one.abs().max()) for one in expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return worst / max(scale, torch.finfo(torch.float32).tiny)
