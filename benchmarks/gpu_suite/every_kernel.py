"""Every kernel once, small: what compute-sanitizer watches. ``python -m`` it on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests" / "cuda")]


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from test_emulated_lora_linear import bank, base

    from lora_kernels import ops

    torch.manual_seed(0)
    dtypes = [torch.float16]
    if torch.cuda.get_device_capability() >= (8, 0):
        dtypes += [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        for rows, k, n in [(1, 512, 1024), (9, 101, 67), (32, 512, 520), (70, 136, 130)]:
            for mode in ("none", "peft", "bank", "dropout"):
                x, weight, bias, residual = (t.cuda() for t in base(rows, k, n, dtype))
                operands = {
                    name: v.cuda() if isinstance(v, torch.Tensor) else v
                    for name, v in bank(mode, rows, k, n, dtype).items()
                }
                leaves = [x, weight, bias]
                leaves += [operands[f] for f in ("lora_a", "lora_b") if f in operands]
                for leaf in leaves:
                    leaf.requires_grad_()
                y = ops.lora_linear(
                    x, weight, bias, residual=residual, activation="gelu", **operands
                )
                torch.autograd.grad(y.float().sum(), leaves)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
