"""Calls of operators without the cost of autograd where there is nothing to differentiate.

An operator with a gradient registered in Python passes through Python once more on every call,
also under ``torch.no_grad()``: about 5 µs, more than a small projection takes, and decoding makes
hundreds of such calls per token. With gradients it costs over 100 µs per layer and step, which a
plain ``torch.autograd.Function`` does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_jit_trace = torch._C._get_tracing_state


def is_plain(x: torch.Tensor, *, cuda: bool = False) -> bool:
    """Whether a call on ``x`` may go straight to the kernel of its device.

    True for plain CPU tensors (with ``cuda``, an operator that has a CUDA kernel: CUDA tensors
    too) outside of tracing (torch.compile's and TorchScript's), of every dispatch mode (fake
    tensors, FLOP counters, ...) and of torch.func's transforms.
    """
    return (
        type(x) is torch.Tensor
        and (x.is_cpu or (cuda and x.is_cuda))
        and not _is_compiling()
        and _modes() == 0
        and not _transforms()
        and _jit_trace() is None
    )


def has_cuda(op: Any) -> bool:
    """Whether an operator overload has a CUDA kernel in this build."""
    name = op.name().split(".")[0]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))


def straight(op: Any) -> Callable[[torch.Tensor], Any]:
    """What chooses, by an operand, a callable that runs an overload's kernel and nothing else.

    It gives None where the call is not plain (:func:`is_plain`) and has to go through ``op``.
    """
    on_cpu, on_cuda = partial(op.redispatch, _CPU), partial(op.redispatch, _CUDA)
    cuda = has_cuda(op)

    def kernel(x: torch.Tensor) -> Any:
        if not is_plain(x, cuda=cuda):
            return None
        return on_cpu if x.is_cpu else on_cuda

    return kernel
