"""Two processes make the updates of one: gradients, weights and log compared, and only the first one writes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_cases import make_case

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig, TrainConfig
from medsam_lora.errors import ConfigError, TrainingError
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.training.dataset import PromptOptions, SliceDataset
from medsam_lora.training.distributed import Group, check_gpus, joined, launch
from medsam_lora.training.loop import Trainer

HERE = Path(__file__).parent
TIMES = {"duration_s", "images_per_s", "peak_memory_mib"}


def segmenter() -> Segmenter:
    return build_segmenter(
        ModelConfig(name="vit_nano", weights="random", image_size=64),
        MethodConfig(name="lora", rank=2),
        FusionConfig(name="learned"),
        ["t1n", "t1c", "t2f", "t2w"],
        ["WT"],
        0,
        torch.device("cpu"),
    )


def train_and_note(out: Path, options: dict[str, Any]) -> None:
    """Train in this process, alone or as one of several, noting gradients and weights of every update."""
    torch.set_num_threads(1)
    with joined("cpu") as (group, _):
        model = segmenter()
        # Seven slices: batches of three leave one, of which the second process has no slice.
        cases = [make_case("a", "train", 0, n=4), make_case("b", "train", 1)]
        settings = TrainConfig(**{"epochs": 2, "batch_size": 3, "lr": 1e-3, "select": "last", "flip": True, **options})
        dataset = SliceDataset(cases, model.regions, PromptOptions(jitter_px=4), 64)
        state = out / f"state{group.rank}.pt"
        trainer = Trainer(
            model, dataset, [make_case("c", "val", 2), make_case("d", "val", 3)], settings, state, "", group
        )
        gradients: list[list[torch.Tensor]] = []
        step = trainer.optimiser.step

        def noted(*args: Any, **kwargs: Any) -> Any:
            gradients.append([p.grad.clone() for g in trainer.optimiser.param_groups for p in g["params"]])
            return step(*args, **kwargs)

        trainer.optimiser.step = noted  # type: ignore[method-assign]
        rows = trainer.fit()
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        torch.save((gradients, model.adapter_state(), rows), out / f"rank{group.rank}of{group.size}.pt")


def fail_in_the_second(out: Path) -> None:
    with joined("cpu") as (group, _):
        if group.rank == 1:
            raise TrainingError("the loss is nan", case_id="a", remedy="Lower train.lr.")
        group.gathered(0)


def note_blas(out: Path) -> None:
    with joined("cpu") as (group, _):
        logging.getLogger("medsam_lora.test").info("said by %d", group.rank)
        (out / f"blas{group.rank}").write_text(os.environ.get("OPENBLAS_NUM_THREADS", ""))


def noted(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "accumulation": 2}], ids=["plain", "accumulated"])
def test_two_processes_make_the_updates_of_one(
    tmp_path: Path, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    train_and_note(tmp_path, options)
    launch(train_and_note, 2, {"out": tmp_path, "options": options})
    assert "Warning" not in capfd.readouterr().err
    alone, first, second = (noted(tmp_path / f"rank{r}.pt") for r in ("0of1", "0of2", "1of2"))
    assert len(alone[0]) == len(first[0]) == len(second[0]) >= 4
    for one, own, other in zip(alone[0], first[0], second[0], strict=True):
        for a, b, c in zip(one, own, other, strict=True):
            assert torch.equal(b, c), "both processes must hold the same gradient"
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    # The gradients are not merely equal: they say something.
    assert max(float(g.abs().max()) for g in first[0][-1]) > 1e-4
    for name, tensor in alone[1].items():
        assert torch.equal(first[1][name], second[1][name])
        # Adam's first updates are the rate times the sign of a gradient, and rounding decides that of nearly zero.
        apart = (first[1][name] - tensor).abs() > 2e-4 + 1e-3 * tensor.abs()
        assert apart.float().mean() <= 1e-3, name
    assert first[2] == second[2]
    for row, expected in zip(first[2], alone[2], strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == (None if value is None else pytest.approx(value, rel=2e-2, abs=2e-3)), key
    assert (tmp_path / "state0.pt").is_file() and not (tmp_path / "state1.pt").exists()


def test_an_error_in_one_process_is_that_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        launch(fail_in_the_second, 2, {"out": tmp_path})
    assert (caught.value.case_id, caught.value.remedy) == ("a", "Lower train.lr.")


@pytest.mark.parametrize("chosen", [None, "3"])
def test_each_process_gives_blas_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], chosen: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", chosen)
    monkeypatch.setattr(logging.getLogger("medsam_lora"), "level", logging.INFO)
    launch(note_blas, 2, {"out": tmp_path})
    # What the first process says is said, as without others.
    assert [line for line in capfd.readouterr().err.splitlines() if "said by" in line] == ["said by 0"]
    assert {(tmp_path / f"blas{rank}").read_text() for rank in (0, 1)} == {chosen or "4"}
    assert os.environ.get("OPENBLAS_NUM_THREADS") == chosen


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"WORLD_SIZE": "2"}, "no RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK=''"),
    ],
)
def test_half_of_what_torchrun_sets_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], text: str
) -> None:
    """Left behind in a shell, say."""
    monkeypatch.delenv("RANK", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{text}.*Unset WORLD_SIZE"), joined("cpu"):
        pass


@pytest.mark.parametrize(
    ("device", "gpus", "remedy"),
    [
        ("cpu", 0, None),
        ("auto", 0, None),
        ("auto", 1, "--device cpu"),
        ("cuda", 1, "--device cpu"),
        ("cuda", 2, None),
        ("auto", 2, None),
        ("cuda:0", 2, "--device cuda"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, remedy: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if remedy is None:
        check_gpus(2, device, "train.processes")
        return
    with pytest.raises(ConfigError, match=r"train\.processes is 2") as caught:
        check_gpus(2, device, "train.processes")
    assert remedy in str(caught.value)


def test_torchrun_brings_the_processes_together(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\nfrom medsam_lora.training.distributed import joined\n"
        "with joined('cpu') as (group, device):\n"
        "    total = group.total({'n': float(group.rank + 1)})\n"
        f"    Path(r'{tmp_path}', f'{{group.rank}}.txt').write_text(f'{{group.size}} {{device}} {{total}}')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["2 cpu {'n': 3.0}"] * 2


def test_a_group_of_one_talks_to_nobody() -> None:
    alone = Group()
    model = torch.nn.Linear(1, 1)
    assert alone.wrapped(model, torch.device("cpu")) is model and alone.is_main
    assert (
        alone.gathered(3) == [3] and alone.any(True) and not alone.any(False) and alone.total({"a": 1.0}) == {"a": 1.0}
    )
