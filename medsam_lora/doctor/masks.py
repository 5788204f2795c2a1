"""Masks on their way: the reference in the store, the fusion of the modalities, the threshold, and the score."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch

from medsam_lora.doctor.result import Result, fault, ok
from medsam_lora.doctor.sources import cut
from medsam_lora.doctor.subject import Subject
from medsam_lora.geometry import place
from medsam_lora.inference import predictor
from medsam_lora.io.manifest import case_path
from medsam_lora.io.store import read_index
from medsam_lora.labels import CONVENTIONS, LABELS, REGIONS
from medsam_lora.metrics.per_case import region_scores
from medsam_lora.records import PreparedSlices
from medsam_lora.stages import scoring

OUTSIDE = 255
SAME = 1e-6


def labels(subject: Subject) -> Result:
    """Whether the stored references hold the file's own labels, voxel for voxel, and training gets masks of them."""
    known = set(LABELS.values()) | {0}
    values = {int(v) for case in subject.whole.values() for v in np.unique(np.asarray(case.label))}
    voxels = sum(int((np.asarray(case.label) > 0).sum()) for case in subject.whole.values())
    differing = 0
    for case_id in subject.records:
        differing += _differing(subject, subject.whole[case_id])
    segmenter = subject.segmenter
    dtypes, wrong_targets = set(), 0
    for batch, case in zip(subject.batches(segmenter), subject.slices, strict=True):
        dtypes.add(str(batch.masks.dtype).removeprefix("torch."))
        expected = np.stack([np.isin(case.label[0], REGIONS[r]) for r in segmenter.regions])  # type: ignore[index]
        wrong_targets += int((batch.masks[0].cpu().numpy() != expected).sum())
    compared = f"{differing} differ from the files" if subject.records else "the files are not at hand"
    measured = (
        f"labels {sorted(values)} in {voxels} stored tumour voxels, {compared}; targets of {', '.join(sorted(dtypes))}"
        f", {wrong_targets} voxels off"
    )
    numbers = {"labels": sorted(values), "voxels": voxels, "differing": differing, "target_voxels_off": wrong_targets}
    if not values <= known or differing:
        return fault(
            measured,
            "The stored references are not those of the files: label maps were resized or resampled with interpolation "
            "(bilinear makes labels 1 and 3 out of 0, 2 and 4), or are stale.",
            "Use nearest-neighbour for label maps, and prepare again.",
            **numbers,
        )
    if dtypes != {"bool"} or wrong_targets:
        return fault(
            measured,
            "The targets of the training are not the binary masks of the regions.",
            "Threshold the labels to masks after every spatial step, and never interpolate masks bilinearly.",
            **numbers,
        )
    return ok(measured, **numbers)


def _differing(subject: Subject, case: PreparedSlices) -> int:
    """Stored voxels that are not those of the file, which is read without this package."""
    assert case.label is not None
    stored = np.full(case.crop.shape, OUTSIDE, np.uint8)
    stored[:, :, list(case.ks)] = np.asarray(case.label).transpose(1, 2, 0)
    native = place(stored, case.crop, case.native, fill=OUTSIDE)
    record = subject.records[case.case_id]
    image = nib.nifti1.Nifti1Image.from_filename(case_path(record, "seg", subject.root))
    raw = np.rint(np.asarray(image.dataobj)).astype(np.int64)
    convention = str(read_index(subject.store / case.case_id).get("label_convention", record.label_convention))
    canonical = np.zeros(raw.shape, np.uint8)
    for value, meaning in CONVENTIONS[convention].items():
        canonical[raw == value] = meaning
    inside = native != OUTSIDE
    return int((native[inside] != canonical[inside]).sum())


def fusion(subject: Subject) -> Result:
    """Whether modalities that agree are given back, ones that differ are fused between them, and all are trained."""
    fuse = subject.segmenter.fusion
    generator = torch.Generator().manual_seed(0)
    n_modalities = len(subject.segmenter.modalities)
    logits = 4 * torch.randn(2, n_modalities, 2, 16, 16, generator=generator)
    logits = logits.to(subject.device).requires_grad_()
    was_training = fuse.training
    agreed = beyond = 0.0
    silent: list[str] = []
    levels = logits.numel()
    for mode in (False, True):
        fuse.train(mode)
        alike = logits[:, :1].expand_as(logits)
        agreed = max(agreed, float((fuse(alike) - logits[:, 0]).detach().abs().max()))
        fused = fuse(logits)
        over = torch.maximum(fused - logits.amax(dim=1), logits.amin(dim=1) - fused)
        beyond = max(beyond, float(over.detach().max()))
        levels = min(levels, len(fused.unique()))
        if mode:
            strength = _reaching(fused, logits)
            silent = [m for m, s in zip(subject.segmenter.modalities, strength, strict=True) if not float(s) > 0]
    fuse.train(was_training)
    masks = subject.predicted(subject.segmenter)
    kinds = sorted({str(mask.dtype) for mask in masks})
    measured = (
        f"{subject.config.fusion.name} of {n_modalities}: equal logits come back to {agreed:.1e}, others stay between "
        f"theirs to {max(beyond, 0):.1e}, {levels} values; {len(silent)} modalities without gradient; "
        f"masks of {', '.join(kinds)}"
    )
    numbers = {"agreed": agreed, "beyond": max(beyond, 0.0), "without_gradient": silent, "mask_types": kinds}
    if kinds != ["bool"]:
        return fault(
            measured,
            "The predicted masks are not binary: masks of several modalities were added up, so that a 'Dice' can be "
            "anything up to 1.6.",
            "Fuse logits or probabilities and threshold once.",
            **numbers,
        )
    if agreed > 1e-3 or beyond > 1e-3 or levels <= 2 * n_modalities + 2:
        return fault(
            measured,
            "The fusion of the modalities does not average logits: masks are summed, or thresholded before they are "
            "fused, so that the result is not a binary mask and scores mean nothing.",
            "Average logits or probabilities of the modalities, and apply one threshold afterwards.",
            **numbers,
        )
    if silent:
        return fault(
            measured,
            f"No gradient reaches {', '.join(silent)}: the masks are thresholded before they are fused.",
            "Fuse logits, and threshold once at the end.",
            **numbers,
        )
    return ok(measured, **numbers)


def _reaching(fused: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """How much gradient of the fused logits reaches each modality, shape (M,)."""
    nothing = torch.zeros(logits.shape[1])
    if not fused.requires_grad:
        return nothing
    gradient = torch.autograd.grad(fused.sum(), logits, allow_unused=True)[0]
    return nothing if gradient is None else gradient.abs().sum(dim=(0, 2, 3, 4)).cpu()


def score(subject: Subject) -> Result:
    """Whether masks are logits over the threshold, and their Dice is that of a volume, by a plain count of voxels."""
    segmenter = subject.segmenter
    segmenter.eval()
    logits = subject.logits(segmenter)
    masks = subject.predicted(segmenter)
    cutoff = subject.config.predict.threshold
    off = sum(
        int(((one[0].sigmoid() > cutoff).numpy() != mask[0]).sum()) for one, mask in zip(logits, masks, strict=True)
    )
    low, high = min(float(one.min()) for one in logits), max(float(one.max()) for one in logits)
    share = off / sum(mask[0].size for mask in masks)
    case = _several(subject)
    plain, over_slices = _counted(subject, case)
    validated = predictor.validate_case(
        segmenter, case, subject.config.prompt.boxes, subject.config.prompt.min_component_voxels, subject.options
    ).dice
    reported = _reported(subject, case)
    measured = (
        f"logits {low:.1f} to {high:.1f}, {share:.2%} of the voxels on the wrong side of the threshold {cutoff:g}; "
        f"Dice of {len(case.ks)} slices together {plain:.3f} by counting, {validated:.3f} at validation, "
        f"{reported:.3f} as evaluate scores it (a mean over slices would say {over_slices:.3f})"
    )
    numbers = {"lowest_logit": low, "highest_logit": high, "wrong_side_share": share}
    numbers |= {"counted": plain, "validated": validated, "reported": reported, "mean_over_slices": over_slices}
    if low >= 0 and high <= 1:
        return fault(
            measured,
            "The model gives probabilities where logits are expected: a second sigmoid follows, which puts everything "
            "between 0.5 and 0.73.",
            "Give logits; the sigmoid belongs to the loss and to the threshold.",
            **numbers,
        )
    if share > 1e-3:
        return fault(
            measured,
            "Masks are not what the threshold says: logits are compared with a probability (0.5 instead of 0).",
            "Compare logits with log(t / (1 - t)), or probabilities with t.",
            **numbers,
        )
    if max(abs(validated - plain), abs(reported - plain)) > SAME or not 0 <= plain <= 1:
        return fault(
            measured,
            "The Dice is not that of the volume: it is averaged over slices or counts empty slices as 1, so that "
            "numbers of different protocols are compared.",
            "Count voxels over the whole case, once.",
            **numbers,
        )
    return ok(measured, **numbers)


def _several(subject: Subject) -> PreparedSlices:
    """Slices of one case, of much and of little tumour: on equal ones a mean over slices would not show."""
    case = subject.whole[subject.slices[0].case_id]
    assert case.label is not None
    areas = [int(np.count_nonzero(label)) for label in case.label]
    order = sorted(range(len(areas)), key=areas.__getitem__)
    return cut(case, sorted({order[0], order[len(order) // 2], order[-1]}))


def _counted(subject: Subject, case: PreparedSlices) -> tuple[float, float]:
    """Dice over all slices, mean over the regions, counted voxel by voxel; and the mean of those of the slices."""
    masks = predictor.predict_slices(subject.segmenter, case, subject.boxes(case), subject.options)
    label = np.asarray(case.label)
    volume, slices = [], []
    for r, region in enumerate(subject.segmenter.regions):
        reference, mask = np.isin(label, REGIONS[region]), masks[:, r].astype(bool)
        both, total = (reference & mask).sum(axis=(1, 2)), reference.sum(axis=(1, 2)) + mask.sum(axis=(1, 2))
        volume.append(2 * both.sum() / total.sum() if total.sum() else 1.0)
        slices.append(np.mean([2 * b / t if t else 1.0 for b, t in zip(both, total, strict=True)]))
    return float(np.mean(volume)), float(np.mean(slices))


def _reported(subject: Subject, case: PreparedSlices) -> float:
    """The same Dice as the stage ``evaluate`` counts it."""
    masks = predictor.predict_slices(subject.segmenter, case, subject.boxes(case), subject.options)
    x, y, _ = case.crop.shape
    grid = case.crop.cropped((0, 0, 0), (x, y, len(case.ks)))
    label = np.asarray(case.label).transpose(1, 2, 0)
    dices = []
    for r, region in enumerate(subject.segmenter.regions):
        mask = masks[:, r].transpose(1, 2, 0).astype(np.uint8)
        meaning = {1: frozenset(REGIONS[region])}
        pairs = scoring.compare(label, mask, meaning, [region], grid)
        dices.append(float(region_scores(pairs[region])["dice"]))
    return float(np.mean(dices))
