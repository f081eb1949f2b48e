"""Which kernels a call launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


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
