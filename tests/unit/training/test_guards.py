"""The peak of memory is that of the run that is asked about."""

from __future__ import annotations

import sys

import pytest
import torch

from medsam_lora.training.guards import deterministic, peak_memory_mib, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_an_earlier_peak_is_forgotten_and_a_new_one_seen() -> None:
    before = peak_memory_mib(CPU)
    large = torch.ones(64 * 2**20)  # 256 MiB
    high = peak_memory_mib(CPU)
    assert high > before - 1 and high >= 256
    del large
    reset_peak_memory(CPU)
    low = peak_memory_mib(CPU)
    assert low < high - 200
    again = torch.ones(32 * 2**20)
    assert peak_memory_mib(CPU) > low + 100
    del again


def test_deterministic_kernels_without_writing_every_new_tensor_twice() -> None:
    settings = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    assert before, "torch's default, which costs a pass over every tensor"
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled() and not settings.fill_uninitialized_memory
    assert settings.fill_uninitialized_memory is before and not torch.are_deterministic_algorithms_enabled()
