"""Every kernel once, small: what compute-sanitizer watches. ``python -m`` it on a GPU."""

from __future__ import annotations

import sys

import torch

from .cases import operators
from .machine import dtypes


def main() -> int:
    torch.manual_seed(0)
    for operator in operators().values():
        operator.every_kernel(dtypes())
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
