"""Training in several processes: who does which slices, and what the processes tell each other.

Every process holds the whole model and takes its share of every batch; `DistributedDataParallel` averages the
gradients, so that all processes make the same update. Under ``torchrun`` the processes are there already; with
``train.processes`` above 1 `launch` starts them on this machine.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from medsam_lora.errors import ConfigError, MedsamLoraError
from medsam_lora.messages import level_of_messages, say_messages
from medsam_lora.processes import sharing_cores

T = TypeVar("T")


# torch 2.13 has another name for it, and warns of the old one.
_WITHOUT_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


@dataclass(frozen=True)
class Group:
    """The processes of a training run, as one of them sees them.

    Parameters
    ----------
    rank : int
        This process, from 0.
    size : int
        Processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The part of this process of a batch or of a list of cases; it may be empty.

        Examples
        --------
        >>> [Group(rank, 2).share("abc") for rank in (0, 1)]
        [['a', 'c'], ['b']]
        """
        return list(items[self.rank :: self.size])

    def total(self, values: dict[str, float]) -> dict[str, float]:
        """The sum over the processes, name by name; each gives the same names."""
        if self.size == 1:
            return values
        return {name: sum(own[name] for own in self.gathered(values)) for name in values} if values else values

    def gathered(self, value: T) -> list[T]:
        """What every process gives, in the order of ranks."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def any(self, flag: bool) -> bool:
        """Whether some process says so."""
        return any(self.gathered(flag))

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model as it must be called for its gradients to be averaged over the processes."""
        if self.size == 1:
            return model
        # Buffers belong to the frozen base. Every declared parameter takes part in every step, or DDP says so.
        places = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=places, **_WITHOUT_BUFFERS)

    def unsynchronised(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Within this context gradients are added up in each process, not averaged yet."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def under_torchrun() -> bool:
    """Whether this process is one of several that ``torchrun`` or `launch` started."""
    return _number("WORLD_SIZE", 1) > 1


def _number(name: str, default: int | None = None) -> int:
    """A whole number that a launcher put into the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ConfigError(
            f"the environment has WORLD_SIZE={os.environ.get('WORLD_SIZE')}, as under torchrun, but "
            + (f"no {name}" if text is None else f"{name}={text!r}"),
            remedy="Unset WORLD_SIZE, or start with torchrun, which sets all of them.",
        )
    return int(text)


@contextmanager
def joined(device: str) -> Iterator[tuple[Group, str]]:
    """Join the processes named by the environment, where there are several.

    Parameters
    ----------
    device : str
        As asked for; ``auto`` and ``cuda`` become this process's own GPU.

    Yields
    ------
    group : Group
    device : str
    """
    if not under_torchrun():
        yield Group(), device
        return
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{_number('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    elif device == "auto":
        device = "cpu"
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=_meeting_place(),
        rank=rank,
        world_size=size,
    )
    try:
        yield Group(dist.get_rank(), dist.get_world_size()), device
    except MedsamLoraError as error:
        # Said before the group is left: the others then fail for want of this process, and that must not come first.
        _say(error)
        raise
    finally:
        dist.destroy_process_group()


def check_gpus(processes: int, device: str, setting: str) -> None:
    """Refuse more processes than there are GPUs, where each is to have its own.

    Parameters
    ----------
    processes : int
    device : str
        As asked for.
    setting : str
        The name of the setting that says `processes`.

    Raises
    ------
    ConfigError
        Where some process would be without a GPU, or all were to share one.
    """
    if device != "cuda" and not (device == "auto" and torch.cuda.is_available()):
        if device.startswith("cuda:"):
            raise ConfigError(
                f"{setting} is {processes}, and --device {device} is one GPU",
                remedy=f"Set {setting}=1, or --device cuda.",
            )
        return
    if torch.cuda.device_count() < processes:
        raise ConfigError(
            f"{setting} is {processes}, and there are {torch.cuda.device_count()} GPUs",
            remedy=f"Lower {setting}, or use --device cpu.",
        )


def launch(work: Callable[..., object], processes: int, arguments: dict[str, Any]) -> None:
    """Call a function in several processes that `joined` can bring together, and wait for them.

    Parameters
    ----------
    work : callable
        Importable by name.
    processes : int
    arguments : dict
        Its keyword arguments, picklable.

    Raises
    ------
    MedsamLoraError
        What one of them raised.
    """
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as place:
        level = level_of_messages()
        settings = (processes, str(Path(place) / "meeting"), level, failures, work, arguments)
        with sharing_cores(processes):
            context = multiprocessing.spawn(_process, settings, processes, join=False)
        assert context is not None
        try:
            while not context.join():
                pass
        except KeyboardInterrupt:
            # Each process was interrupted too, and saves its state.
            for process in context.processes:
                process.join()
            raise
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException):
            if failures.empty():
                raise
            raise failures.get() from None


def _process(
    rank: int, processes: int, meeting: str, level: int, failures: Any, work: Callable[..., object], arguments: dict
) -> None:
    global _failures
    _failures = failures
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), _MEETING: meeting}
    say_messages(level if rank == 0 else logging.ERROR)
    # Each with all the threads of the machine, they would wait for each other's cores.
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    try:
        work(**arguments)
    except MedsamLoraError as error:
        _say(error)
        raise SystemExit(1) from None


_failures: Any = None
"""In a process that `launch` started: where its error goes."""


def _say(error: MedsamLoraError) -> None:
    if _failures is not None:
        _failures.put(error)


# How `launch` tells its processes where to meet; torchrun uses MASTER_ADDR and MASTER_PORT.
_MEETING = "MEDSAM_LORA_MEETING"


def _meeting_place() -> str:
    place = os.environ.get(_MEETING)
    return "env://" if place is None else f"file://{place}"
