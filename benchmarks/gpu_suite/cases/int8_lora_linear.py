"""int8_lora_linear against torch's INT8 product, torchao, and 16-bit weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels import ops

from ..case import Aim, Case, Contestant, Function, absent
from .lora_linear import RANK, call_sizes, has_wgmma, sizes

INT_MM_ROWS = 32  # torch._int_mm takes more than 16, and a library whole tiles the best
WEIGHT_ONLY_ROWS = 16  # at most: where quantizing x gains nothing


def cases(dtype: torch.dtype) -> list[Case]:
    """Whisper large's feed-forward block: decoding, and a batch of encoder windows."""

    def case(
        kind: str,
        size: tuple[int, int, int],
        run: Callable[[Case, str], dict[str, Contestant]],
        *aims: Aim,
        grad: bool = False,
    ) -> Case:
        m, k, n = size
        shape = {"rows": m, "in_features": k, "out_features": n}
        name = f"int8-{kind}{m}x{k}x{n}"
        counted = work_of_step if grad else work
        graphs, arithmetic = m <= 32, str(dtype)[6:] if grad else "int8"
        return Case(
            name, shape, dtype, counted, run, aims, graphs=graphs, grad=grad, arithmetic=arithmetic
        )

    over_merged = Aim("time", 1 / 1.5, "merged")
    many = [over_merged, Aim("roofline", 0.75), Aim("time", 1.08, "without_lora")]
    if has_wgmma("cuda"):
        many.append(Aim("time", 0.85, "ours_mma"))  # what the plan takes it for
    large = [(4096, 1280, 5120), (4096, 5120, 1280)]
    return [
        *(case("", (m, 1280, 5120), contestants, Aim("bandwidth", 0.8)) for m in (1, 16)),
        *(case("", size, contestants, *many) for size in large),
        case("static-", large[0], with_static_scale, over_merged),
        case("train-", large[0], training, grad=True),
    ]


def work(case: Case) -> tuple[float, float]:
    """W in INT8, the rest in 16 bits. LoRA's products count twice: they have half of the rate."""
    m, k, n = sizes(case)
    moved = n * k + (RANK * (n + k) + m * (n + k)) * case.dtype.itemsize
    return float(moved), 2.0 * m * n * k + 2 * 2.0 * m * RANK * (n + k)


def work_of_step(case: Case) -> tuple[float, float]:
    """Forward as above, here by the rate of 16 bits; backward: dy, x, W, dx and the factors."""
    m, k, n = sizes(case)
    moved, operations = work(case)
    backward = n * k + (2 * RANK * (n + k) + m * (n + 2 * k)) * case.dtype.itemsize
    branch = 2.0 * m * RANK * (n + k)
    return moved + backward, operations / 2 + 2.0 * m * n * k + 2 * branch


class Operands:
    """x, a weight in INT8 and in 16 bits, and the factors of an adapter."""

    def __init__(self, case: Case, device: str) -> None:
        m, k, n = sizes(case)
        self.n, self.dtype = n, case.dtype
        self.x = torch.randn(m, k, device=device, dtype=case.dtype)
        weight = torch.randn(n, k, device=device) / k**0.5
        self.scales = weight.abs().amax(1) / 127
        self.q = (weight / self.scales.unsqueeze(1)).round().to(torch.int8)
        self.packed = ops.int8_pack(self.q, self.scales)
        self.weight = weight.to(case.dtype)
        self.a = torch.randn(RANK, k, device=device, dtype=case.dtype) / k**0.5
        self.b = torch.randn(RANK, n, device=device, dtype=case.dtype)

    def ours(self, x_scale: torch.Tensor | None = None) -> torch.Tensor:
        return ops.int8_lora_linear(
            self.x, self.packed, self.n, None, self.a, self.b, x_scale=x_scale
        )

    def ours_mma(self) -> torch.Tensor:
        with lk.force_implementation("cuda_mma"):
            return self.ours()

    def merged(self) -> torch.Tensor:
        return F.linear(self.x, self.weight)

    def int_mm(self, x_scale: torch.Tensor | None = None) -> torch.Tensor:
        """torch's INT8 product, of as many rows as it takes at least, with eager LoRA."""
        x, m = self.x, self.x.shape[0]
        by_row = x.abs().amax(1, keepdim=True).float() / 127 if x_scale is None else x_scale
        rows = (x / by_row).round().to(torch.int8)
        if m < INT_MM_ROWS:
            rows = F.pad(rows, (0, 0, 0, INT_MM_ROWS - m))
        base = torch._int_mm(rows, self.q.t())[:m].float() * (by_row * self.scales)
        return self.with_lora(base.to(self.dtype))

    def weight_only(self) -> torch.Tensor:
        """Weights in INT8, products in 16 bits: compiled, the weight is never written as such."""
        base = F.linear(self.x, self.q.to(self.dtype)) * self.scales.to(self.dtype)
        return self.with_lora(base)

    def with_lora(self, base: torch.Tensor) -> torch.Tensor:
        return base.addmm_(self.x @ self.a.t(), self.b)


def compiled(function: Callable[[], torch.Tensor]) -> Function:
    torch._dynamo.reset()
    return torch.compile(function)


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    """Ours with a live adapter and without; the others with eager LoRA, or merged."""
    m, k, n = sizes(case)
    o = Operands(case, device)
    weight_only = m <= WEIGHT_ONLY_ROWS

    def torchao() -> Function:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        linear = torch.nn.Sequential(torch.nn.Linear(k, n, False, device, case.dtype))
        config = Int8WeightOnlyConfig if weight_only else Int8DynamicActivationInt8WeightConfig
        quantize_(linear, config())
        return compiled(lambda: o.with_lora(linear(o.x)))

    # Forcing asks the host, beside which many rows take long; few rows are captured, and alike.
    more = {"ours_mma": Contestant(lambda: o.ours_mma)} if has_wgmma(device) and m > 32 else {}
    found = {
        "ours": Contestant(lambda: o.ours),
        **more,
        "without_lora": Contestant(lambda: lambda: ops.int8_lora_linear(o.x, o.packed, n)),
        "merged": Contestant(lambda: o.merged),
        "int_mm": Contestant(lambda: o.int_mm),
        "torchao_compiled": Contestant(torchao, compiled=True, absent=absent("torchao")),
    }
    if weight_only:
        found["weight_only_compiled"] = Contestant(lambda: compiled(o.weight_only), compiled=True)
    return found


def with_static_scale(case: Case, device: str) -> dict[str, Contestant]:
    """Of x, calibrated: nobody looks for the largest magnitude of a row."""
    o = Operands(case, device)
    x_scale = (o.x.abs().amax() / 127).float().reshape(1)
    return {
        "ours": Contestant(lambda: lambda: o.ours(x_scale)),
        "dynamic": Contestant(lambda: o.ours),
        "merged": Contestant(lambda: o.merged),
        "int_mm": Contestant(lambda: lambda: o.int_mm(x_scale)),
    }


def training(case: Case, device: str) -> dict[str, Contestant]:
    """Quantization-aware: forward and backward, whose gradients pass rounding straight through."""
    o = Operands(case, device)
    leaves = [tensor.requires_grad_() for tensor in (o.x, o.a, o.b)]
    dy = torch.randn(o.x.shape[0], o.n, device=device, dtype=case.dtype)
    dequantized = (o.q * o.scales.unsqueeze(1)).to(case.dtype)

    def step(function: Callable[[], torch.Tensor]) -> Function:
        return lambda: torch.autograd.grad(function(), leaves, dy)

    def eager() -> torch.Tensor:
        x_scale = o.x.detach().abs().amax(1, keepdim=True).float() / 127
        rounded = ((o.x.detach() / x_scale).round() * x_scale).to(case.dtype)
        x = o.x + (rounded - o.x).detach()
        return F.linear(x, dequantized) + (o.x @ o.a.t()) @ o.b

    def unquantized() -> torch.Tensor:
        return ops.lora_linear(o.x, o.weight, None, o.a, o.b)

    return {
        "ours": Contestant(lambda: step(o.ours)),
        "eager": Contestant(lambda: step(eager)),
        "unquantized": Contestant(lambda: step(unquantized)),
    }


def every_kernel(dtypes: list[torch.dtype], device: str) -> None:
    """Few and many rows, with LayerNorm and a choice, and the gradients."""
    call_sizes(call_each, (4000, 1000, 2570), dtypes, device)


def call_each(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    m, k, n = size
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    packed = ops.int8_pack(q, torch.rand(n, device=device) / k)
    a = torch.randn(5, k, device=device, dtype=dtype, requires_grad=True)
    b = torch.randn(5, n, device=device, dtype=dtype, requires_grad=True)
    y = ops.int8_lora_linear(x, packed, n, None, a, b, activation="gelu")
    torch.autograd.grad(y.float().sum(), [x, a, b])
    with torch.no_grad():
        x_scale = torch.full((1,), 0.03, device=device)
        ops.int8_lora_linear(x, packed, n, None, a, b, x_scale=x_scale)
        norm = (torch.ones(k, device=device), torch.zeros(k, device=device), 1e-5)
        ops.int8_lora_linear(x, packed, n, None, a, b, norm=norm)
        ops.int8_lora_topk(x, packed, n, 3, None, a, b)
