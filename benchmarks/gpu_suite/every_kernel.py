"""Every kernel once: what compute-sanitizer watches. ``python -m`` it on a GPU.

Tensors come from ``cudaMalloc`` one by one where PYTORCH_NO_CUDA_MEMORY_CACHING is set: in a block
of torch's caching allocator an index out of range is a valid address of another tensor.
"""

from __future__ import annotations

import sys

import torch

from .cases import operators
from .machine import dtypes


def call_all(kinds: list[torch.dtype], device: str) -> None:
    torch.manual_seed(0)
    for operator in operators().values():
        operator.every_kernel(kinds, device)


def main() -> int:
    call_all(dtypes(), "cuda")
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
