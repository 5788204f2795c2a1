"""Runs of a pipeline side by side: each in a process with its share of the cores, or with a GPU of its own."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from typing import Any, Final

from medsam_lora.errors import ConfigError, TrainingError
from medsam_lora.messages import level_of_messages, say_messages
from medsam_lora.processes import sharing_cores
from medsam_lora.progress import SILENCE, track
from medsam_lora.stages.pipeline import Method
from medsam_lora.stages.workplace import Workplace

logger = logging.getLogger(__name__)

Task = tuple[Callable[..., object], tuple[Any, ...]]
"""A function, importable by name, that takes a workplace and these arguments."""

_FEWER: Final = "Free memory, or run with fewer --jobs; what is finished is kept."


def check_jobs(methods: Sequence[Method], device: str, jobs: int) -> None:
    """Refuse more runs side by side than the machine has places for.

    Parameters
    ----------
    methods : sequence of Method
        What will be run.
    device : str
    jobs : int

    Raises
    ------
    ConfigError
        Where several runs would have to share a GPU, or a run has processes of its own.
    """
    if jobs == 1:
        return
    from medsam_lora.training.distributed import check_gpus

    check_gpus(jobs, device, "--jobs")
    own = [method for method in methods if method.config.train.processes > 1]
    if own:
        raise ConfigError(
            f"--jobs is {jobs}, and {own[0].label} is to be trained by {own[0].config.train.processes} processes",
            remedy="Give either --jobs or train.processes.",
        )


def side_by_side(
    place: Workplace, tasks: Mapping[str, Task], jobs: int, after: Callable[[], object] | None = None
) -> None:
    """Do the tasks of a pipeline, several at a time.

    Parameters
    ----------
    place : Workplace
        Gains what the tasks add to its failures and seconds.
    tasks : mapping of str to Task
        By the name that stands before what they log.
    jobs : int
        Tasks at a time; with 1 they are done here, one after the other.
    after : callable, optional
        Called behind each task.

    Raises
    ------
    MedsamLoraError
        The first that a task raised. Tasks that are under way are finished, others not begun.
    KeyboardInterrupt
        Behind what the tasks under way saved.
    """
    if jobs == 1 or len(tasks) < 2:
        for work, arguments in tasks.values():
            work(place, *arguments)
            if after is not None:
                after()
        return
    jobs = min(jobs, len(tasks))
    context = multiprocessing.get_context("spawn")
    pids, places, stop = context.SimpleQueue(), context.SimpleQueue(), context.Event()
    for number in range(jobs):
        places.put(number)
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, context, initializer=_begin, initargs=(pids, places, stop, place.device, jobs, level_of_messages())
    )
    shared = replace(place, jobs=jobs, workers=max(1, place.workers // jobs), failures=[], seconds={})
    waiting = iter(tasks.items())
    under_way: set[concurrent.futures.Future[Workplace]] = set()
    try:
        with sharing_cores(jobs):
            for _ in track(tasks, "runs", len(tasks)):
                # No more than there are processes: the pool would hand out one too many, which could not be taken back.
                for name, task in islice(waiting, jobs - len(under_way)):
                    under_way.add(pool.submit(_do, name, shared, task))
                ended, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                future = ended.pop()
                under_way.remove(future)
                _add(place, future)
                if after is not None:
                    after()
    except KeyboardInterrupt:
        # They are in groups of their own, so that each is told once: a second time it would not save its state.
        stop.set()
        while not pids.empty():
            _interrupt(pids.get())
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _add(place: Workplace, future: concurrent.futures.Future[Workplace]) -> None:
    """Add what a task found to what is known."""
    try:
        done = future.result()
    except BrokenProcessPool as error:
        raise TrainingError("a process of the runs side by side died", path=place.out, remedy=_FEWER) from error
    place.failures += done.failures
    for stage, seconds in done.seconds.items():
        place.seconds[stage] = place.seconds.get(stage, 0.0) + seconds


def _interrupt(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        logger.debug("process %d has ended already", pid)


_device = "cpu"
"""In a process of `side_by_side`: where it computes."""
_stop: Any = None
"""There too: set once the runs were interrupted."""
_level = logging.WARNING
"""There too: of what is said."""


def _begin(pids: Any, places: Any, stop: Any, device: str, jobs: int, level: int) -> None:
    global _device, _stop, _level
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but while there is a task
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    pids.put(os.getpid())
    os.environ[SILENCE] = "1"  # bars of several processes would overwrite each other
    _level = level
    import torch

    from medsam_lora.models.allocator import keep_freed_memory

    keep_freed_memory()
    number = places.get()
    on_gpu = device != "cpu" and torch.cuda.is_available()
    _device = f"cuda:{number}" if on_gpu else device
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _do(name: str, place: Workplace, task: Task) -> Workplace:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _stop.is_set():
            raise KeyboardInterrupt
        say_messages(_level, f"{name}: ")
        work, arguments = task
        own = replace(place, device=_device, failures=[], seconds={})
        work(own, *arguments)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What it began with is known; what it added goes back.
    return replace(own, stores={})
