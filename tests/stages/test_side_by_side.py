"""Runs side by side: the results of one after the other, one error, one interrupt for each, no GPU shared."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medsam_lora.errors import ConfigError, TrainingError
from medsam_lora.records import Finding
from medsam_lora.stages.pipeline import parse_pipeline
from medsam_lora.stages.run import run
from medsam_lora.stages.side_by_side import check_jobs, side_by_side
from medsam_lora.stages.sweep import sweep_file
from medsam_lora.stages.workplace import Workplace, timed

HERE = Path(__file__).parent
PIPELINE: dict[str, Any] = {
    "name": "tiny",
    "phantom": {"cases": 6, "seed": 3, "shape": [48, 56, 20]},
    "split": {"train": 0.5, "val": 0.2, "test": 0.3, "seed": 0},
    "methods": [{"name": "decoder_only"}, {"name": "lora", "rank": 2}],
    "model": {"name": "vit_nano", "weights": "random", "image_size": 64},
    "train": {"epochs": 1, "slices_per_epoch": 4, "batch_size": 2, "lr": 1e-3, "cache_gib": 0.1},
    "evaluate": {"bootstrap": 100},
}


def place(out: Path, **changes: Any) -> Workplace:
    return Workplace(out, parse_pipeline({**PIPELINE, **changes}), out, "cpu", workers=4)


# ---------------------------------------------------------------- tasks, importable by the processes
def note(where: Workplace, name: str) -> None:
    with timed(where, name):
        where.failures.append(Finding(name, "", "missing_file", "error", "", ""))
        logging.getLogger("medsam_lora.test").info("50% of it done")
        text = f"{os.getpid()} {where.device} {where.workers} {where.jobs} {torch.get_num_threads()}"
        (where.out / name).write_text(text)
        time.sleep(0.2)


def fail(_: Workplace, case: str) -> None:
    raise TrainingError("the loss is nan", case_id=case, remedy="Lower train.lr.")


def die(_: Workplace) -> None:
    os._exit(3)


def wait_for_interrupts(where: Workplace, name: str) -> None:
    """Ends a second behind its first interrupt, as a training that saves its state does, and counts them."""
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    (where.out / f"{name}.begun").touch()
    deadline = time.monotonic() + 60
    while not seen and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    (where.out / f"{name}.interrupts").write_text(str(len(seen)))


def wait_side_by_side(out: Path) -> None:
    side_by_side(place(out), {name: (wait_for_interrupts, (name,)) for name in "abc"}, 2)


# ---------------------------------------------------------------- what comes of them
def test_tasks_share_the_machine_and_give_back_what_they_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, calls = place(tmp_path), []
    monkeypatch.setattr(logging.getLogger("medsam_lora"), "level", logging.INFO)
    where.failures.append(Finding("before", "", "missing_file", "error", "", ""))
    side_by_side(where, {name: (note, (name,)) for name in "abc"}, 2, lambda: calls.append(len(where.failures)))
    assert sorted(f.case_id for f in where.failures) == ["a", "b", "before", "c"] and calls == [2, 3, 4]
    assert where.seconds.keys() == set("abc") and all(seconds >= 0.2 for seconds in where.seconds.values())
    noted = [(tmp_path / name).read_text().split() for name in "abc"]
    assert str(os.getpid()) not in {pid for pid, *_ in noted}
    # Half of the four workers, and half of the threads.
    assert {tuple(rest) for _, *rest in noted} == {("cpu", "2", "2", str(max(1, torch.get_num_threads() // 2)))}
    assert "b: 50% of it done" in capfd.readouterr().err


def test_one_at_a_time_is_done_here(tmp_path: Path) -> None:
    where = place(tmp_path)
    side_by_side(where, {name: (note, (name,)) for name in "ab"}, 1)
    assert {(tmp_path / name).read_text().split()[0] for name in "ab"} == {str(os.getpid())}
    assert [f.case_id for f in where.failures] == ["a", "b"]


def test_an_error_in_one_is_that_of_all_and_what_is_under_way_is_finished(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {
        "a": (note, ("a",)),
        "b": (fail, ("b-1",)),
        **{str(n): (note, (str(n),)) for n in range(9)},
    }
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        side_by_side(place(tmp_path), tasks, 2)
    assert (caught.value.case_id, caught.value.remedy) == ("b-1", "Lower train.lr.")
    assert (tmp_path / "a").is_file() and not (tmp_path / "8").exists()


def test_a_process_that_dies_is_told_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="died") as caught:
        side_by_side(place(tmp_path), {"a": (die, ()), "b": (die, ())}, 2)
    assert caught.value.remedy is not None and "--jobs" in caught.value.remedy


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("whole_group", [True, False], ids=["from a terminal", "to the parent alone"])
def test_an_interrupt_reaches_each_process_once(tmp_path: Path, whole_group: bool) -> None:
    code = "import sys, pathlib; from test_side_by_side import *; wait_side_by_side(pathlib.Path(sys.argv[1]))"
    # A shell's background jobs ignore SIGINT, which children inherit.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + code
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=HERE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.begun"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    (os.killpg if whole_group else os.kill)(parent.pid, signal.SIGINT)
    _, error = parent.communicate(timeout=120)
    assert b"KeyboardInterrupt" in error and parent.returncode != 0
    assert sorted(path.name for path in tmp_path.glob("*.interrupts")) == ["a.interrupts", "b.interrupts"]
    assert {path.read_text() for path in tmp_path.glob("*.interrupts")} == {"1"}


# ---------------------------------------------------------------- whole pipelines
def test_a_pipeline_side_by_side_is_that_of_one_after_the_other(tmp_path: Path) -> None:
    pipeline, threads = parse_pipeline(PIPELINE), torch.get_num_threads()
    # Sums over other numbers of threads differ in their last bits; each of two processes has half of them.
    torch.set_num_threads(2)
    try:
        assert run(pipeline, tmp_path / "two", device="cpu", jobs=2) == 0
        torch.set_num_threads(1)
        assert run(pipeline, tmp_path / "one", device="cpu") == 0
    finally:
        torch.set_num_threads(threads)
    for name in ("decoder_only", "lora"):
        for file in ("adapter.safetensors", "per_case.csv"):
            one, two = ((tmp_path / out / "runs" / name / file).read_bytes() for out in ("one", "two"))
            assert one == two, (name, file)


def test_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = parse_pipeline({**PIPELINE, "train": {"processes": 2}})
    with pytest.raises(ConfigError, match="decoder_only is to be trained by 2 processes"):
        run(several, tmp_path / "out", device="cpu", jobs=2)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_jobs(parse_pipeline(PIPELINE).methods, "auto", 2)
    with pytest.raises(ConfigError, match="--jobs is 3, and there are 2 GPUs"):
        check_jobs(parse_pipeline(PIPELINE).methods, "auto", 3)
    with pytest.raises(ConfigError, match="--device cuda:1 is one GPU"):
        check_jobs(parse_pipeline(PIPELINE).methods, "cuda:1", 2)


def test_a_sweep_over_processes_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    methods = [{"name": "lora"}]
    path.write_text(yaml.safe_dump({**PIPELINE, "methods": methods, "grid": {"train.processes": [1, 2]}}))
    with pytest.raises(ConfigError, match="processes=2 is to be trained by 2 processes"):
        sweep_file(path, [], tmp_path / "out", device="cpu", jobs=2)
    assert not (tmp_path / "out").exists()


def test_the_trials_of_a_study_follow_each_other(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    path = tmp_path / "s.yaml"
    methods = [{"name": "lora"}]
    path.write_text(yaml.safe_dump({**PIPELINE, "methods": methods, "study": {"keys": {"method.rank": [2, 4]}}}))
    with pytest.raises(ConfigError, match="--jobs with a study"):
        sweep_file(path, [], tmp_path / "out", device="cpu", jobs=2)
