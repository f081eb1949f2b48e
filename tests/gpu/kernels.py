"""Which kernels a call launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lora_kernels as lk


def kernels_of(call: Callable[[], object]) -> str:
    """Names of all kernels of a call, in one text; skips the test where the profiler sees none."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profile.key_averages())
    if not names:
        pytest.skip("torch.profiler sees no kernels here")
    return names


def by_wgmma_and_by_mma(
    call: Callable[[], torch.Tensor], kernel: str, part: Callable[[], object] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of a call by wgmma, twice the same bits, and by the row that leaves it out.

    `kernel` is launched by the one and not by the other; where `part` is given, by that part of it.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is of sm_90a alone")
    got = call()
    assert torch.equal(got, call())
    assert kernel in kernels_of(part or call)
    with lk.force_implementation("cuda_mma"):
        plain = call()
        assert kernel not in kernels_of(part or call)
    return got, plain
