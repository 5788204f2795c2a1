"""The loop on a real model at toy size: it learns, it resumes bit for bit, it selects by Dice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig, TrainConfig
from medsam_lora.errors import TrainingError
from medsam_lora.inference.predictor import CaseScore, PredictOptions
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.records import PreparedSlices
from medsam_lora.training.dataset import PromptOptions, SliceDataset
from medsam_lora.training.log import LOG_COLUMNS
from medsam_lora.training.loop import Interrupted, Trainer
from medsam_lora.training.optimiser import build_optimiser

TIMES = {"duration_s", "images_per_s", "peak_memory_mib"}


def segmenter(**method: Any) -> Segmenter:
    model = ModelConfig(name="vit_nano", weights="random", image_size=64)
    config = MethodConfig(**{"name": "lora", "rank": 4, "dropout": 0.1, **method})
    return build_segmenter(
        model, config, FusionConfig(name="learned"), ["t1n", "t1c", "t2f", "t2w"], ["WT"], 0, torch.device("cpu")
    )


def trainer(
    path: Path,
    training: list[PreparedSlices],
    validation: list[PreparedSlices],
    model: Segmenter | None = None,
    **options: Any,
) -> Trainer:
    settings = TrainConfig(**{"epochs": 4, "batch_size": 2, "lr": 1e-3, "select": "last", **options})
    model = segmenter() if model is None else model
    dataset = SliceDataset(training, model.regions, PromptOptions(jitter_px=4), 64)
    return Trainer(model, dataset, validation, settings, path, "same")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_four_epochs_are_two_and_two_more_bit_for_bit(
    tmp_path: Path, training_cases: list[PreparedSlices], validation_cases: list[PreparedSlices]
) -> None:
    whole = trainer(tmp_path / "whole.pt", training_cases, validation_cases)
    rows = whole.fit()

    class Enough(Exception):
        pass

    def stop_in_epoch_three(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Enough

    halves = trainer(tmp_path / "half.pt", training_cases, validation_cases)
    with pytest.raises(Enough):
        halves.fit(stop_in_epoch_three)  # killed after epoch 2, before its state was written
    again = trainer(tmp_path / "half.pt", training_cases, validation_cases)
    again.resume()
    assert again.progress.epoch == 2
    resumed_rows = again.fit()
    assert without_times(resumed_rows) == without_times(rows)
    for name, tensor in whole.segmenter.adapter_state().items():
        assert torch.equal(tensor, again.segmenter.adapter_state()[name]), name


def test_ctrl_c_saves_within_an_epoch_and_resumes_bit_for_bit(
    tmp_path: Path, training_cases: list[PreparedSlices], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole.pt", training_cases, [], epochs=2, accumulation=1)
    whole.fit()
    stopped = trainer(tmp_path / "stopped.pt", training_cases, [], epochs=2)
    update = stopped._update

    def interrupt_once() -> None:
        update()
        if stopped.progress.epoch == 1 and stopped.progress.position == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stopped, "_update", interrupt_once)
    with pytest.raises(Interrupted, match="epoch 1"):
        stopped.fit()
    again = trainer(tmp_path / "stopped.pt", training_cases, [], epochs=2)
    again.resume()
    assert again.progress.position == 2
    again.fit()
    for name, tensor in whole.segmenter.adapter_state().items():
        assert torch.equal(tensor, again.segmenter.adapter_state()[name]), name


def test_it_learns_and_the_log_says_so(
    tmp_path: Path, training_cases: list[PreparedSlices], validation_cases: list[PreparedSlices]
) -> None:
    run = trainer(tmp_path / "s.pt", training_cases, validation_cases, epochs=12, lr=2e-3)
    rows = run.fit()
    assert [row["epoch"] for row in rows] == list(range(13))
    assert all(set(row) <= set(LOG_COLUMNS) for row in rows)
    assert rows[-1]["loss"] < 0.8 * rows[1]["loss"]
    assert rows[-1]["val_dice"] > rows[0]["val_dice"] + 0.1
    assert 0 < rows[-1]["train_area_ratio"] < 3


def test_the_best_epoch_is_kept_not_the_last(
    tmp_path: Path,
    training_cases: list[PreparedSlices],
    validation_cases: list[PreparedSlices],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer(tmp_path / "s.pt", training_cases, validation_cases, select="best", epochs=3)
    seen: list[dict[str, torch.Tensor]] = []
    dices = iter([0.1, 0.9, 0.5, 0.4])

    def fixed(case: PreparedSlices) -> Any:
        seen.append({k: v.clone() for k, v in run.segmenter.adapter_state().items()})
        from medsam_lora.inference.predictor import CaseScore

        return CaseScore(next(dices), 1.0)

    monkeypatch.setattr(run, "_validate", fixed)
    run.fit()
    for name, tensor in run.segmenter.adapter_state().items():
        assert torch.equal(tensor, seen[1][name]), name
    assert any(not torch.equal(seen[1][n], seen[3][n]) for n in seen[1])


def test_patience_stops_early(
    tmp_path: Path, training_cases: list[PreparedSlices], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medsam_lora.inference.predictor import CaseScore

    run = trainer(tmp_path / "s.pt", training_cases, training_cases[:1], epochs=10, patience=2, select="best")
    monkeypatch.setattr(run, "_validate", lambda case: CaseScore(0.5, 1.0))
    assert [row["epoch"] for row in run.fit()] == [0, 1, 2]
    again = trainer(tmp_path / "s.pt", training_cases, training_cases[:1], epochs=10, patience=2, select="best")
    monkeypatch.setattr(again, "_validate", lambda case: CaseScore(0.5, 1.0))
    again.resume()
    assert [row["epoch"] for row in again.fit()] == [0, 1, 2]


def test_accumulated_gradients_equal_those_of_the_whole_batch(
    tmp_path: Path, training_cases: list[PreparedSlices]
) -> None:
    models = [segmenter(dropout=0.0), segmenter(dropout=0.0)]
    runs = [
        trainer(tmp_path / f"{i}.pt", training_cases, [], model, epochs=1, **options)
        for i, (model, options) in enumerate(
            zip(models, ({"batch_size": 6}, {"batch_size": 2, "accumulation": 3}), strict=True)
        )
    ]
    for run in runs:
        run.options = run.options.model_copy(update={"clip_norm": None})
        run.optimiser = torch.optim.SGD(
            [
                {**g, "lr": 0.1, "base_lr": 0.1, "weight_decay": 0.0}
                for g in build_optimiser(run.segmenter, run.options).param_groups
            ]
        )
        run.fit()
    for (name, one), two in zip(models[0].adapter_state().items(), models[1].adapter_state().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=name)


def test_a_state_of_other_settings_is_refused(tmp_path: Path, training_cases: list[PreparedSlices]) -> None:
    run = trainer(tmp_path / "s.pt", training_cases, [], epochs=1)
    run.fit()
    other = trainer(tmp_path / "s.pt", training_cases, [], epochs=1)
    other.identity = "another"
    with pytest.raises(TrainingError, match=r"other settings, data or weights"):
        other.resume()


def test_a_loss_that_is_not_finite_stops_with_a_remedy(tmp_path: Path, training_cases: list[PreparedSlices]) -> None:
    run = trainer(tmp_path / "s.pt", training_cases, [], epochs=1)
    with torch.no_grad():
        run.segmenter.trainable_groups()["decoder"][0].fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"Lower train\.lr"):
        run.fit()


def test_the_optimiser_holds_exactly_the_declared_parameters() -> None:
    model = segmenter()
    optimiser = build_optimiser(model, TrainConfig(lr=1e-3, lr_encoder=1e-4))
    held = [id(p) for g in optimiser.param_groups for p in g["params"]]
    declared = [id(p) for group in model.trainable_groups().values() for p in group]
    assert sorted(held) == sorted(declared) and len(set(held)) == len(held)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(held)
    rates = {g["name"]: g["lr"] for g in optimiser.param_groups}
    assert rates["encoder"] == 1e-4 and rates["decoder"] == 1e-3
    assert all(g["weight_decay"] == 0 for g in optimiser.param_groups if g["name"].endswith("/vectors"))


def test_a_method_without_anything_to_train_is_refused() -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        build_optimiser(
            build_segmenter(
                ModelConfig(name="vit_nano", weights="random", image_size=64),
                MethodConfig(name="zero_shot"),
                FusionConfig(),
                ["t1c"],
                ["WT"],
                0,
                torch.device("cpu"),
            ),
            TrainConfig(),
        )


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_float32_adapters(tmp_path: Path, training_cases: list[PreparedSlices], amp: str) -> None:
    run = trainer(tmp_path / "s.pt", training_cases, [], epochs=2, amp=amp)
    before = {name: tensor.clone() for name, tensor in run.segmenter.adapter_state().items()}
    rows = run.fit()
    after = run.segmenter.adapter_state()
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in after.values())
    assert sum(not torch.equal(before[name], after[name]) for name in after) > 0.9 * len(after)
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert all(np.isfinite(row["grad_norm"]) for row in rows[1:])


def test_an_update_that_overflows_in_fp16_is_not_counted(tmp_path: Path, training_cases: list[PreparedSlices]) -> None:
    """The scaler leaves it out; its infinite gradient has no part in the mean of the epoch."""
    run = trainer(tmp_path / "s.pt", training_cases, [], epochs=1, amp="fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    row = run.fit()[-1]
    plain = trainer(tmp_path / "p.pt", training_cases, [], epochs=1, amp="fp16").fit()[-1]
    assert row["updates"] < plain["updates"] and np.isfinite(row["grad_norm"])


def test_the_batch_that_fitted_is_remembered_over_validations(
    tmp_path: Path, training_cases: list[PreparedSlices], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "s.pt", training_cases, training_cases[:1], epochs=2)
    limits = []

    def note(segmenter: object, case: object, kind: str, min_voxels: int, options: PredictOptions) -> CaseScore:
        limits.append(options.limit.slices)
        options.limit.slices = 1
        return CaseScore(0.5, 1.0)

    monkeypatch.setattr("medsam_lora.training.loop.validate_case", note)
    run.fit()
    assert limits == [None, 1, 1]


def test_a_focal_share_and_adam_are_used(tmp_path: Path, training_cases: list[PreparedSlices]) -> None:
    plain = trainer(tmp_path / "a.pt", training_cases, [], epochs=1)
    focal = trainer(tmp_path / "b.pt", training_cases, [], epochs=1, focal_share=0.9, optimiser="adam")
    assert type(plain.optimiser) is torch.optim.AdamW and type(focal.optimiser) is torch.optim.Adam
    one, two = plain.fit()[-1], focal.fit()[-1]
    assert two["loss"] < one["loss"], "focal terms are smaller than the cross-entropy they replace"


def test_checkpointing_trains_the_same_adapter(tmp_path: Path, training_cases: list[PreparedSlices]) -> None:
    # With dropout, which must draw the same masks when a block runs for the second time.
    models = [segmenter(), segmenter()]
    for model, checkpointing in zip(models, (False, True), strict=True):
        options = {"epochs": 1, "checkpointing": checkpointing}
        trainer(tmp_path / "state.pt", training_cases, [], model, **options).fit()
        assert model.sam.image_encoder.checkpointing is checkpointing
    plain, checkpointed = (model.adapter_state() for model in models)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_compiled_blocks_train_the_same_adapter_but_for_rounding(
    tmp_path: Path, training_cases: list[PreparedSlices], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own backend for tests, which traces and differentiates as the compiling one and needs no compiler."""
    made = []

    def traced(function: object, **options: object) -> object:
        made.append(options)
        return compile_(function, backend="aot_eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    models = [segmenter(), segmenter()]
    rows = [
        trainer(tmp_path / "state.pt", training_cases, training_cases[:1], model, epochs=1, compile=wanted).fit()[-1]
        for model, wanted in zip(models, (False, True), strict=True)
    ]
    assert len(made) == 1
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)
    plain, compiled = (model.adapter_state() for model in models)
    for name in plain:
        assert (plain[name] - compiled[name]).abs().max() <= 2e-4, name
