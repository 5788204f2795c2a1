"""Each known fault is planted into the program's own code or settings, and the doctor names it.

H1 to H10 are the ways in which a LoRA-tuned SAM was found to lose its Dice while its loss fell; docs/doctor.md lists
them. Without one the same cohort and settings are found healthy (test_doctor.py). Where the program makes one
impossible, it is planted at the nearest place where it could come in.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.doctor import learning
from medsam_lora.doctor.diagnosis import diagnose
from medsam_lora.doctor.sources import Given
from medsam_lora.inference import predictor
from medsam_lora.inference.volume import to_native
from medsam_lora.models import assemble, segmenter
from medsam_lora.models.input_spec import PIXEL_MEAN, PIXEL_STD, InputSpec
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import decoder, low_rank
from medsam_lora.peft.contract import Adaptation
from medsam_lora.prompts.box import to_model
from medsam_lora.prompts.sources import on_grid
from medsam_lora.stages import predict as predict_stage
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.training import loop
from medsam_lora.training.losses import LossTerms, segmentation_loss
from medsam_lora.training.optimiser import build_optimiser
from medsam_lora.transforms import stages
from medsam_lora.transforms.intensity import zscore

SETTINGS = (
    "model.name=vit_nano",
    "model.image_size=128",
    "data.modalities=[t1c,t2f]",
    "method.rank=4",
    "train.lr=4e-4",
    "train.lr_encoder=4e-3",
)

Patch = pytest.MonkeyPatch


class Cohort:
    """Phantom cases and their manifest."""

    def __init__(self, folder: Path) -> None:
        self.root, self.manifest = folder / "cohort", folder / "manifest.csv"
        make_cohort(self.root, 2, 11, (64, 76, 28))
        build_manifest(self.root, self.manifest, {"train": 1.0, "val": 0.0, "test": 0.0}, 0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("doctor"))


def examined(cohort: Cohort, checks: str, *settings: str, **bounds: Any) -> dict[str, dict[str, Any]]:
    given = Given(settings=(*SETTINGS, *settings), manifest=cohort.manifest, root=cohort.root)
    rows = diagnose(given, only=checks.split(), device="cpu", **bounds)
    return {row["check"]: row for row in rows}


def named(row: dict[str, Any], *words: str) -> None:
    """The row is a fault that says these words and what to do."""
    assert row["status"] == "FAULT", row
    text = f"{row['measured']} {row['meaning']}"
    assert [word for word in words if word not in text] == [], text
    assert row["measured"] and row["remedy"].endswith(".")


# ------------------------------------------------------------------ settings that are a fault by themselves
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("train.dice_weight=0",), ("no Dice term", "predicting background")),  # H1
        (("train.schedule=constant", "train.warmup_share=0", "train.clip_norm=null"), ("without warm-up",)),  # H6
        (("method.decoder=frozen",), ("mask decoder is frozen",)),  # H7
        (("slicing.name=max_slice",), ("only the largest tumour slice",)),  # H9
    ],
)
def test_settings_are_named(cohort: Cohort, settings: tuple[str, ...], words: tuple[str, ...]) -> None:
    named(examined(cohort, "settings", *settings)["settings"], *words)


# ------------------------------------------------------------------ H1: what the loss measures
def entropy_alone(*given: Any) -> LossTerms:
    terms = segmentation_loss(*given)
    return LossTerms(terms.bce, terms.dice, terms.bce, terms.focal, terms.iou)


def softmax_of_one_channel(*given: Any) -> LossTerms:
    terms = segmentation_loss(*given)
    return LossTerms(terms.total - terms.bce, terms.dice, 0 * terms.bce, terms.focal, terms.iou)


def of_thresholded_masks(logits: Tensor, *given: Any) -> LossTerms:
    return segmentation_loss(20 * ((logits > 0).float() - 0.5), *given)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (entropy_alone, ("dominated by cross-entropy", "background")),
        (softmax_of_one_channel, ("cross-entropy term is 0",)),
        (of_thresholded_masks, ("gradient is zero",)),
    ],
)
def test_h1_a_loss_that_does_not_measure_dice(cohort: Cohort, loss: Any, words: tuple[str, ...], monkeypatch: Patch):
    monkeypatch.setattr(loop, "segmentation_loss", loss)
    named(examined(cohort, "loss")["loss"], *words)


# ------------------------------------------------------------------ H2: evaluated weights are not the trained ones
def test_h2_weights_merged_on_eval(cohort: Cohort, monkeypatch: Patch) -> None:
    """Loralib's own default."""
    own = low_rank.LoraLinear.__init__

    def merging(self: low_rank.LoraLinear, *given: Any) -> None:
        own(self, *given)
        self.merge_weights = True

    monkeypatch.setattr(low_rank.LoraLinear, "__init__", merging)
    named(examined(cohort, "reload", "method.targets=[q,proj]")["reload"], "merged into them in place", "attn.proj")


def test_h2_wrapped_keys_are_passed_over_at_loading(cohort: Cohort, monkeypatch: Patch) -> None:
    """As `strict=False` does in silence."""

    def load(self: Segmenter, state: dict[str, Tensor]) -> None:
        own = self.adaptation.state()
        self.adaptation.load({n: own[n] if "qkv" in n else t for n, t in state.items()})

    monkeypatch.setattr(Segmenter, "load_adapter_state", load)
    named(examined(cohort, "reload")["reload"], "not the one trained", "not loaded")


def test_h2_a_wrapped_layer_without_the_pretrained_weight(cohort: Cohort, monkeypatch: Patch) -> None:
    own = low_rank.LoraQkv.__init__

    def afresh(self: low_rank.LoraQkv, *given: Any) -> None:
        own(self, *given)
        weight = nn.init.kaiming_uniform_(torch.empty_like(self.weight), generator=torch.Generator().manual_seed(0))
        del self.weight  # as a parameter it would be refused already: it is none that the method declares
        self.register_buffer("weight", weight)

    monkeypatch.setattr(low_rank.LoraQkv, "__init__", afresh)
    named(examined(cohort, "identity")["identity"], "changed before the first step", "pretrained weight")


def test_h2_validation_of_other_weights(cohort: Cohort, monkeypatch: Patch) -> None:
    def of_the_base(model: Segmenter, *given: Any) -> Any:
        with model.adaptation.disable():
            return predictor.validate_case(model, *given)

    monkeypatch.setattr(learning, "validate_case", of_the_base)
    row = examined(cohort, "overfit", "train.batch_size=4", steps=20)["overfit"]
    named(row, "what is evaluated is not what is trained", "20 updates")


def test_h2_prediction_with_other_weights(cohort: Cohort, monkeypatch: Patch) -> None:
    def untrained(*given: Any) -> tuple[Segmenter, Any]:
        found, metadata = assemble.load_segmenter(*given)
        for name, parameter in found.sam.mask_decoder.named_parameters():
            if "output_hypernetworks_mlps" in name:
                nn.init.zeros_(parameter)
        return found, metadata

    monkeypatch.setattr(predict_stage, "load_segmenter", untrained)
    named(examined(cohort, "predict")["predict"], "not what was validated", "other weights")


def test_h2_merging_without_the_scale(cohort: Cohort, monkeypatch: Patch) -> None:
    def dense(self: low_rank.Branch, dtype: torch.dtype) -> Tensor:
        return self.tensor("B").to(dtype) @ self.tensor("A").to(dtype)

    monkeypatch.setattr(low_rank.Branch, "dense", dense)
    named(examined(cohort, "merge", "method.alpha=32")["merge"], "merged model")


# ------------------------------------------------------------------ H3: fusion of the modalities
class SumOfMasks(nn.Module):
    def forward(self, logits: Tensor, present: Any = None) -> Tensor:
        return (logits > 0).float().sum(dim=1)


def test_h3_masks_of_the_modalities_are_summed(cohort: Cohort, monkeypatch: Patch) -> None:
    monkeypatch.setattr(assemble, "build_fusion", lambda *_: SumOfMasks())
    named(examined(cohort, "fusion")["fusion"], "masks are summed", "not a binary mask")


def test_h3_masks_that_are_counts(cohort: Cohort, monkeypatch: Patch) -> None:
    monkeypatch.setattr(predictor, "nested", lambda masks: masks.astype(np.int64) * 4)
    named(examined(cohort, "fusion")["fusion"], "not binary", "masks of int64")


# ------------------------------------------------------------------ H4: input range
def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def twice(self: InputSpec, z: Tensor) -> Tensor:
    return normalised(OWN_PIXELS(self, z))


def zero_to_one(self: InputSpec, z: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return normalised((OWN_PIXELS(self, z) * std + mean) / 255)


def zscores_as_grey_values(self: InputSpec, z: Tensor) -> Tensor:
    return normalised(z.flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1))


def never(self: InputSpec, z: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return OWN_PIXELS(self, z) * std + mean


OWN_PIXELS = InputSpec.to_pixels


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (twice, ("normalised twice", "almost one colour")),
        (zscores_as_grey_values, ("normalised twice", "almost one colour")),
        (zero_to_one, ("scaled to 0..1",)),
        (never, ("not the 0 to 255",)),
    ],
)
def test_h4_the_input_range(cohort: Cohort, pixels: Any, words: tuple[str, ...], monkeypatch: Patch) -> None:
    monkeypatch.setattr(InputSpec, "to_pixels", pixels)
    named(examined(cohort, "input")["input"], *words)


def test_h4_the_ablation_of_the_input_range_is_named(cohort: Cohort) -> None:
    named(examined(cohort, "input", "model.input_range=zscore")["input"], "not the 0 to 255")


def test_h4_one_path_normalises_otherwise(cohort: Cohort, monkeypatch: Patch) -> None:
    monkeypatch.setattr(predictor, "zscore", lambda raw, mean, std, voxels: zscore(raw, 0 * mean, 2 * std, voxels))
    named(examined(cohort, "input")["input"], "Training and validation", "do not give the encoder the same picture")


def test_h4_images_with_a_background(cohort: Cohort, monkeypatch: Patch) -> None:
    """Images that were z-scored before they came here: air is not 0 any more, and counts as brain."""
    own = stages._slice_major

    def shifted(array: np.ndarray, *given: Any) -> np.ndarray:
        return own(array + 100 if array.ndim == 4 else array, *given)

    monkeypatch.setattr(stages, "_slice_major", shifted)
    named(examined(cohort, "input")["input"], "background is not 0")


# ------------------------------------------------------------------ H5: box frames
@pytest.mark.parametrize(
    "wrong",
    [
        lambda boxes, scale: to_model(boxes, scale)[:, [1, 0, 3, 2]],  # x and y swapped
        lambda boxes, scale: to_model(boxes, 1.0),  # the scale forgotten
        lambda boxes, scale: to_model(boxes, scale * scale),  # and applied twice
    ],
    ids=["swapped", "unscaled", "scaled twice"],
)
def test_h5_boxes_in_another_frame(cohort: Cohort, wrong: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(segmenter, "to_model", wrong)
    rows = examined(cohort, "box base")
    named(rows["box"], "training and validation", "in another frame", "x and y are swapped")
    named(rows["base"], "far below the box")


def test_h5_the_offset_of_the_crop_is_forgotten(cohort: Cohort, monkeypatch: Patch) -> None:
    def uncropped(boxes: Any, source: Any, target: Any) -> Any:
        return {k: own + 9.0 for k, own in on_grid(boxes, source, target).items()}

    monkeypatch.setattr(predict_stage, "on_grid", uncropped)
    named(examined(cohort, "box")["box"], "The boxes of prediction from the files", "offset of the crop")


def test_h5_masks_come_back_elsewhere(cohort: Cohort, monkeypatch: Patch) -> None:
    monkeypatch.setattr(predict_stage, "to_native", lambda *given: np.roll(to_native(*given), 3, axis=0))
    named(examined(cohort, "way_back")["way_back"], "3.00 voxels away", "do not come back")


# ------------------------------------------------------------------ H6: steps that grow with the rank
def test_h6_a_high_rank_without_a_scale(cohort: Cohort) -> None:
    row = examined(cohort, "step", "method.rank=64", "method.scaling=none")["step"]
    named(row, "grows with the rank", "at rank 64")
    assert row["numbers"]["times_rank_4"] > 3


@pytest.mark.parametrize("method", ["sam_parser+lora", "lora+adapter", "lora+bitfit"])
def test_h6_a_high_rank_within_a_combination(cohort: Cohort, method: str) -> None:
    """Whatever stands first, whether or not the whole can be merged, and however far the other part moves."""
    high = ("method.rank=64", "method.scaling=none")
    assert examined(cohort, "step", f"method.name={method}")["step"]["status"] == "ok"
    named(examined(cohort, "step", f"method.name={method}", *high)["step"], "grows with the rank", "at rank 64")


def test_h6_a_branch_that_does_not_start_at_zero(cohort: Cohort, monkeypatch: Patch) -> None:
    own = low_rank.Branch.create

    def noisy(self: low_rank.Branch, weight: Tensor, generator: torch.Generator) -> None:
        own(self, weight, generator)
        nn.init.normal_(self.tensor("B"), std=0.02, generator=generator)

    monkeypatch.setattr(low_rank.Branch, "create", noisy)
    named(examined(cohort, "identity")["identity"], "changed before the first step", "does not start at zero")


# ------------------------------------------------------------------ H7, H8: what is trained
def test_h7_the_decoder_is_left_out(cohort: Cohort, monkeypatch: Patch) -> None:
    monkeypatch.setattr(decoder, "decoder_part", lambda *_: ([], 0))
    named(examined(cohort, "moved")["moved"], "none of its tensors is declared", "LoRA alone")


def test_h8_an_optimiser_of_the_encoder_alone(cohort: Cohort, monkeypatch: Patch) -> None:
    def encoder_only(model: Segmenter, options: Any) -> torch.optim.Optimizer:
        optimiser = build_optimiser(model, options)
        optimiser.param_groups = [g for g in optimiser.param_groups if g["name"].startswith("encoder")]
        return optimiser

    monkeypatch.setattr(loop, "build_optimiser", encoder_only)
    named(examined(cohort, "moved")["moved"], "Not trained: mask_decoder", "left out")


def test_h8_loading_replaces_the_parameters(cohort: Cohort, monkeypatch: Patch) -> None:
    def replacing(self: Adaptation, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(tensor.clone()))

    monkeypatch.setattr(Adaptation, "load", replacing)
    named(examined(cohort, "moved")["moved"], "replaced after the optimiser was built")


def test_h8_the_encoder_runs_without_autograd(cohort: Cohort, monkeypatch: Patch) -> None:
    own = Segmenter.encode
    monkeypatch.setattr(Segmenter, "encode", lambda self, z: torch.no_grad()(own)(self, z))
    named(examined(cohort, "moved")["moved"], "image_encoder", "Not trained")


# ------------------------------------------------------------------ H9: protocol
def test_h9_a_mean_over_slices(cohort: Cohort, monkeypatch: Patch) -> None:
    def mean_over_slices(model: Segmenter, case: Any, kind: str, fewest: int, options: Any) -> Any:
        masks = predictor.predict_slices(model, case, predictor.reference_boxes(case, kind, fewest), options)[:, 0]
        reference = np.asarray(case.label) > 0
        total = (masks.sum(axis=(1, 2)) + reference.sum(axis=(1, 2))).clip(1)
        return SimpleNamespace(dice=float((2 * (masks & reference).sum(axis=(1, 2)) / total).mean()))

    monkeypatch.setattr(predictor, "validate_case", mean_over_slices)
    named(examined(cohort, "score")["score"], "averaged over slices")


def test_h9_logits_cut_at_a_probability(cohort: Cohort, monkeypatch: Patch) -> None:
    monkeypatch.setattr(predictor, "math", SimpleNamespace(log=lambda _: 0.5))
    named(examined(cohort, "score")["score"], "compared with a probability")


# ------------------------------------------------------------------ H10: masks and sigmoids
def test_h10_labels_resized_bilinearly(cohort: Cohort, monkeypatch: Patch) -> None:
    own = stages._slice_major

    def there_and_back(array: np.ndarray, *given: Any) -> np.ndarray:
        taken = own(array, *given)
        if taken.ndim == 4:
            return taken
        labels = torch.from_numpy(taken).float()[None]
        small = nn.functional.interpolate(labels, scale_factor=0.5, mode="bilinear")
        return nn.functional.interpolate(small, taken.shape[1:], mode="bilinear")[0].round().byte().numpy()

    monkeypatch.setattr(stages, "_slice_major", there_and_back)
    named(examined(cohort, "labels")["labels"], "resized or resampled with interpolation", "differ from the files")


def test_h10_a_second_sigmoid(cohort: Cohort, monkeypatch: Patch) -> None:
    own = Segmenter.decode

    def probabilities(self: Segmenter, *given: Any) -> segmenter.SegmenterOutput:
        output = own(self, *given)
        return segmenter.SegmenterOutput(output.logits.sigmoid(), output.iou)

    monkeypatch.setattr(Segmenter, "decode", probabilities)
    rows = examined(cohort, "score base")
    named(rows["score"], "probabilities where logits are expected", "second sigmoid")
    named(rows["base"], "far below the box")
