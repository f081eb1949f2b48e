"""int8_lora_linear against torch's INT8 product, torchao, and merged 16-bit weights."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels import ops

from ..case import Aim, Case, Contestant, Function
from .lora_linear import RANK, has_wgmma, sizes

INT_MM_ROWS = 17  # what torch._int_mm takes at least


def cases(dtype: torch.dtype) -> list[Case]:
    """Whisper large's feed-forward block: decoding, and a batch of encoder windows."""

    def case(m: int, k: int, n: int, *aims: Aim) -> Case:
        shape = {"rows": m, "in_features": k, "out_features": n}
        name = f"int8-{m}x{k}x{n}"
        return Case(name, shape, dtype, work, contestants, aims, graphs=m <= 32)

    few = [case(m, 1280, 5120, Aim("bandwidth", 0.8)) for m in (1, 16)]
    many = [Aim("time", 1 / 1.5, "merged")]
    if has_wgmma("cuda"):
        many.append(Aim("time", 0.85, "ours_mma"))  # what the plan takes it for
    return [*few, *(case(4096, k, n, *many) for k, n in ((1280, 5120), (5120, 1280)))]


def work(case: Case) -> tuple[float, float]:
    """W in INT8, the rest in 16 bits. INT8 products count half: they have twice the rate."""
    m, k, n = sizes(case)
    moved = n * k + (RANK * (n + k) + m * (n + k)) * case.dtype.itemsize
    return float(moved), 1.0 * m * n * k + 2.0 * m * RANK * (n + k)


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    """Ours with a live adapter and without; the others with eager LoRA, or merged."""
    m, k, n = sizes(case)
    x = torch.randn(m, k, device=device, dtype=case.dtype)
    weight = torch.randn(n, k, device=device) / k**0.5
    scales = weight.abs().amax(1) / 127
    q = (weight / scales.unsqueeze(1)).round().to(torch.int8)
    packed, columns, merged = ops.int8_pack(q, scales), q.t(), weight.to(case.dtype)
    a = torch.randn(RANK, k, device=device, dtype=case.dtype) / k**0.5
    b = torch.randn(RANK, n, device=device, dtype=case.dtype)

    def int_mm() -> torch.Tensor:
        row_scales = x.abs().amax(1, keepdim=True).float() / 127
        rows = (x / row_scales).round().to(torch.int8)
        base = torch._int_mm(rows, columns).float() * (row_scales * scales)
        return base.to(case.dtype).addmm_(x @ a.t(), b)

    def torchao() -> Function:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        linear = torch.nn.Sequential(torch.nn.Linear(k, n, False, device, case.dtype))
        quantize_(linear, Int8DynamicActivationInt8WeightConfig())
        return torch.compile(lambda: linear(x).addmm_(x @ a.t(), b))

    def ours() -> torch.Tensor:
        return ops.int8_lora_linear(x, packed, n, None, a, b)

    def ours_mma() -> torch.Tensor:
        with lk.force_implementation("cuda_mma"):
            return ours()

    # Forcing asks the host, beside which many rows take long; few rows are captured, and alike.
    more = {"ours_mma": Contestant(lambda: ours_mma)} if has_wgmma(device) and m > 32 else {}
    found = {
        "ours": Contestant(lambda: ours),
        **more,
        "without_lora": Contestant(lambda: lambda: ops.int8_lora_linear(x, packed, n)),
        "merged": Contestant(lambda: lambda: F.linear(x, merged)),
    }
    if m >= INT_MM_ROWS:
        found["int_mm"] = Contestant(lambda: int_mm)
    if importlib.util.find_spec("torchao") is not None:
        found["torchao"] = Contestant(torchao, compiled=True)
    return found


def every_kernel(dtypes: list[torch.dtype]) -> None:
    """Few and many rows, with LayerNorm and a choice, and the gradients."""
    for dtype in dtypes:
        shapes = [(1, 512, 1024), (9, 101, 67), (32, 512, 520), (70, 136, 130)]
        if has_wgmma("cuda"):
            shapes.append((4000, 1000, 2570))
        for m, k, n in shapes:
            x = torch.randn(m, k, device="cuda", dtype=dtype, requires_grad=True)
            q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
            packed = ops.int8_pack(q, torch.rand(n, device="cuda") / k)
            a = torch.randn(5, k, device="cuda", dtype=dtype, requires_grad=True)
            b = torch.randn(5, n, device="cuda", dtype=dtype, requires_grad=True)
            y = ops.int8_lora_linear(x, packed, n, None, a, b, activation="gelu")
            torch.autograd.grad(y.float().sum(), [x, a, b])
            with torch.no_grad():
                norm = (torch.ones(k, device="cuda"), torch.zeros(k, device="cuda"), 1e-5)
                ops.int8_lora_linear(x, packed, n, None, a, b, norm=norm)
                ops.int8_lora_topk(x, packed, n, 3, None, a, b)
