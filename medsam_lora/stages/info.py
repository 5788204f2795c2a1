"""What is installed, on which device, and which models and methods are known: at once, without importing torch."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import medsam_lora
from medsam_lora.models import MODELS
from medsam_lora.models.weights import locate
from medsam_lora.peft import METHODS

DISTRIBUTION = "medsam-lora"
GIB = 2**30


def collect() -> dict[str, Any]:
    """Everything that ``medsam-lora info --json`` prints, as plain data.

    Returns
    -------
    dict
        With the keys ``version``, ``python``, ``platform``, ``packages`` (name to version, or None where it is not
        installed), ``device`` (see `device`), ``models`` and ``methods`` (lists, in the order of their tables).
    """
    packages = package_versions()
    return {
        "version": medsam_lora.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": device(packages.get("torch")),
        "models": [_model(name) for name in MODELS],
        "methods": [{"name": name, "summary": spec.summary} for name, spec in METHODS.items()],
    }


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that this one requires (not those of its extras)."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        required = []
    names = [_requirement_name(text) for text in required if "extra ==" not in text]
    return {name: _version(name) for name in names}


def device(torch_version: str | None) -> dict[str, Any]:
    """The device that the stages choose by default, found without torch.

    Parameters
    ----------
    torch_version : str or None
        A version ending in ``+cpu`` cannot use a GPU, whatever the driver offers.

    Returns
    -------
    dict
        ``kind`` (``cuda`` or ``cpu``), ``name``, ``memory_gib`` (the device's own, None where unknown), ``cores``
        (CPU cores this process may use), ``gpus`` (a list of ``name`` and ``memory_gib``), ``note``.
    """
    gpus = cuda_devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = bool(gpus) and torch_version is not None and not torch_version.endswith("+cpu")
    first = gpus[0] if usable else {"name": _cpu_name(), "memory_gib": _ram_gib()}
    note = "a GPU is there, but the installed torch is a CPU build" if gpus and not usable else ""
    return {"kind": "cuda" if usable else "cpu", **first, "cores": cores, "gpus": gpus, "note": note}


def cuda_devices(library: str | None = None) -> list[dict[str, Any]]:
    """Name and memory of every CUDA device that the driver shows to this process.

    Parameters
    ----------
    library : str, optional
        Path or name of the driver library.

    Notes
    -----
    Calls of the CUDA driver interface that make no context, so they cost milliseconds; ``CUDA_VISIBLE_DEVICES``
    is honoured by the driver itself.
    """
    try:
        driver = ctypes.CDLL(library or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return []
        return [_cuda_device(driver, ordinal) for ordinal in range(count.value)]
    except (OSError, AttributeError):  # no driver on this machine, or not a CUDA driver
        return []


def as_text(info: Mapping[str, Any]) -> str:
    """What `collect` gathered, for people."""
    found = info["device"]
    memory = "" if found["memory_gib"] is None else f", {found['memory_gib']:.1f} GiB"
    lines = [
        f"medsam-lora {info['version']}, Python {info['python']}, {info['platform']}",
        f"device      {found['kind']}: {found['name']}{memory}; {found['cores']} CPU cores",
    ]
    if found["note"]:
        lines.append(f"            {found['note']}")
    packages = [f"{name} {version or '(not installed)'}" for name, version in info["packages"].items()]
    lines += ["", *_wrapped("packages    ", packages), "", "models"]
    for model in info["models"]:
        count = f"{model['parameters'] / 1e6:.1f} M parameters, " if model["parameters"] else ""
        here = "weights in this package" if MODELS[model["name"]].embedded else model["weights"]
        weights = here or ("no weights here" if model["official_weights"] else "needs no weights")
        lines += _hanging(f"  {model['name']:<10}{model['summary']} ({count}{model['image_size']} px): {weights}", 12)
    lines += ["", "methods"]
    for method in info["methods"]:
        lines += _hanging(f"  {method['name']:<17}{method['summary']}", 19)
    return "\n".join(lines)


def _model(name: str) -> dict[str, Any]:
    spec = MODELS[name]
    path = None if spec.file_name is None else locate(name)
    return {
        "name": name,
        "summary": spec.summary,
        "image_size": spec.image_size,
        "parameters": spec.parameters,
        "official_weights": spec.file_name,
        "weights": None if path is None else str(path),
    }


def _requirement_name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return requirement if found is None else found.group()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda_device(driver: ctypes.CDLL, ordinal: int) -> dict[str, Any]:
    handle, name, total = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    driver.cuDeviceGet(ctypes.byref(handle), ordinal)
    driver.cuDeviceGetName(name, len(name), handle)
    # The first version of this call counts in 32 bits.
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), handle)
    return {"name": name.value.decode(errors="replace"), "memory_gib": round(total.value / GIB, 1)}


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)


def _hanging(entry: str, indent: int) -> list[str]:
    # A path stays in one piece, to be copied.
    return textwrap.wrap(entry, 118, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _wrapped(head: str, words: Sequence[str], width: int = 100) -> list[str]:
    lines, current = [], head
    for word in words:
        if len(current) + len(word) > width:
            lines.append(current.rstrip())
            current = " " * len(head)
        current += f"{word}, "
    return [*lines, current.rstrip(" ,")]
