"""lora_linear against what people would use instead."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels import ops

from ..case import Aim, Case, Contestant, Function

RANK = 16
# PEFT's step, forward and backward: what the fused operator has to save of it.
TRAINING_AIMS = (
    Aim("time", 1 / 1.4, "peft"),
    Aim("time", 1 / 1.2, "peft_compiled"),
    Aim("peak_bytes", 1.0, "peft"),
)
DECODE_AIMS = (Aim("time", 1.10, "base_alone"), Aim("bandwidth", 0.8))


def cases(dtype: torch.dtype) -> list[Case]:
    """Whisper large's and base's projections, by rows: decoding, an encoder window, a batch."""

    def shape(rows: int, k: int, n: int) -> dict[str, int]:
        return {"rows": rows, "in_features": k, "out_features": n}

    few = [
        Case(f"decode-{m}x{k}x{n}", shape(m, k, n), dtype, work, forward, DECODE_AIMS, graphs=True)
        for m in (1, 8, 32)
        for k, n in ((1280, 1280), (1280, 5120), (5120, 1280))
    ]
    over_base = (Aim("time", 1.05, "base_alone"),)
    if has_wgmma("cuda"):
        over_base += (Aim("time", 0.85, "ours_mma"),)  # what the plan takes it for
    many = [
        Case(f"{m}x{k}x{n}", shape(m, k, n), dtype, work, forward, over_base)
        for m, k, n in (
            (4096, 1280, 1280),
            (12000, 1280, 1280),
            (12000, 1280, 5120),
            (1500, 512, 512),
        )
    ]
    of_steps = TRAINING_AIMS
    if has_wgmma("cuda"):
        of_steps += (Aim("time", 0.85, "ours_mma"),)  # of y and dx; dA and dB are the same
    steps = [
        Case(f"train-{m}x{k}x{n}", shape(m, k, n), dtype, work, training, of_steps, grad=True)
        for m, k, n in ((4096, 1280, 1280), (12000, 1280, 5120))
    ]
    mixed = Case(
        "mixed-32-adapters",
        shape(32, 1280, 5120),
        dtype,
        work_of_mixed,
        mixed_adapters,
        (Aim("time", 1.15, "one_adapter"),),
        graphs=True,
    )
    # The aims' cheapest cases first: what no time is left for is then the least missed.
    return [mixed, *steps, *many, *few]


def has_wgmma(device: str) -> bool:
    """Whether plans may take wgmma there, and the row "cuda_mma" leaves it out."""
    return (
        device == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
    )


def sizes(case: Case) -> tuple[int, int, int]:
    return case.shape["rows"], case.shape["in_features"], case.shape["out_features"]


def ranks_of(adapters: int) -> list[int]:
    """Ranks from 4 to 64, evenly."""
    return [4 + 60 * i // max(1, adapters - 1) for i in range(adapters)]


def work(case: Case) -> tuple[float, float]:
    """Forward: W, the factors, x and y once. With gradients (dx, dA, dB): dy, dx and W again."""
    m, k, n = sizes(case)
    size = case.dtype.itemsize
    once = (n * k + RANK * (n + k) + m * (n + k)) * size
    products, branch = 2.0 * m * n * k, 2.0 * m * RANK * (n + k)
    if not case.grad:
        return float(once), products + branch
    # Backward: dy, x, W and the factors are read, dx and the factors' gradients are written.
    backward = (n * k + 2 * RANK * (n + k) + m * (n + 2 * k)) * size
    # dx: its two products, dy B and that times A; dA and dB: as many again.
    return float(once + backward), 2 * products + 3 * branch


def work_of_mixed(case: Case) -> tuple[float, float]:
    """A row for each adapter: all factors are read, each row is multiplied by its own."""
    m, k, n = sizes(case)
    total = sum(ranks_of(m))
    moved = (n * k + total * (n + k) + m * (n + k)) * case.dtype.itemsize
    return float(moved), 2.0 * m * n * k + 2.0 * total * (n + k)


class Layer(torch.nn.Module):
    """PEFT's own formula, for machines without PEFT."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.a), self.b) * 2.0


def peft_layer(case: Case, device: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A LoRA layer of rank 16 and its two factors."""
    _, k, n = sizes(case)
    linear = torch.nn.Linear(k, n, dtype=case.dtype, device=device)
    if importlib.util.find_spec("peft") is None:
        a = torch.randn(RANK, k, device=device, dtype=case.dtype) / k**0.5
        layer = Layer(linear, a, torch.randn(n, RANK, device=device, dtype=case.dtype))
        return layer, layer.a, layer.b
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
    peft = model.base_model.model[0]
    return peft, peft.lora_A["default"].weight, peft.lora_B["default"].weight


def compiled(layer: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(layer)


def forward(case: Case, device: str) -> dict[str, Contestant]:
    """Ours, cuBLAS alone, cuBLAS with addmm_, merged weights, PEFT eager and compiled."""
    layer, a, b = peft_layer(case, device)
    linear = layer.base_layer
    rows, k, _ = sizes(case)
    x = torch.randn(rows, k, device=device, dtype=case.dtype)
    weight, bias, scale = linear.weight, linear.bias, torch.tensor([2.0], device=device)
    merged = (weight + 2.0 * b @ a).detach()
    scaled_b, down = (2.0 * b.t()).contiguous(), a.t()

    def ours() -> torch.Tensor:
        return ops.lora_linear(x, weight, bias, a, b.t(), scales=scale)

    def addmm() -> torch.Tensor:
        return F.linear(x, weight, bias).addmm_(x @ down, scaled_b)

    def ours_mma() -> torch.Tensor:
        with lk.force_implementation("cuda_mma"):
            return ours()

    def peft_compiled() -> Function:
        module = compiled(layer)
        return lambda: module(x)

    # Forcing asks the host, beside which many rows take long; few rows are captured, and alike.
    more = {"ours_mma": Contestant(lambda: ours_mma)} if has_wgmma(device) and rows > 32 else {}
    return {
        "ours": Contestant(lambda: ours),
        **more,
        "base_alone": Contestant(lambda: lambda: F.linear(x, weight, bias)),
        "addmm": Contestant(lambda: addmm),
        "merged": Contestant(lambda: lambda: F.linear(x, merged, bias)),
        "peft": Contestant(lambda: lambda: layer(x)),
        "peft_compiled": Contestant(peft_compiled, compiled=True),
    }


def training(case: Case, device: str) -> dict[str, Contestant]:
    """Forward and backward with a frozen base."""
    layer, a, b = peft_layer(case, device)
    linear = layer.base_layer.requires_grad_(False)
    rows, k, n = sizes(case)
    x = torch.randn(rows, k, device=device, dtype=case.dtype).requires_grad_()
    dy = torch.randn(rows, n, device=device, dtype=case.dtype)
    scale = torch.tensor([2.0], device=device)

    def step(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Function:
        return lambda: torch.autograd.grad(function(), leaves, dy)

    def ours() -> torch.Tensor:
        return ops.lora_linear(x, linear.weight, linear.bias, a, b.t(), scales=scale)

    def ours_mma() -> Function:
        taken = step(ours, [x, a, b])

        def forced() -> object:
            with lk.force_implementation("cuda_mma"):
                return taken()

        return forced

    def peft_compiled() -> Function:
        module = compiled(layer)
        return step(lambda: module(x), [x, a, b])

    more = {"ours_mma": Contestant(ours_mma)} if has_wgmma(device) else {}
    return {
        "ours": Contestant(lambda: step(ours, [x, a, b])),
        **more,
        "base_alone": Contestant(
            lambda: step(lambda: F.linear(x, linear.weight, linear.bias), [x])
        ),
        "peft": Contestant(lambda: step(lambda: layer(x), [x, a, b])),
        "peft_compiled": Contestant(peft_compiled, compiled=True),
    }


def mixed_adapters(case: Case, device: str) -> dict[str, Contestant]:
    """A row for each adapter, of ranks 4 to 64, against all rows with one of rank 16."""
    rows, k, n = sizes(case)
    ranks = ranks_of(rows)
    offsets = torch.tensor([0, *ranks]).cumsum(0).to(torch.int32).to(device)

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(rank, k, device=device).to(case.dtype) / k**0.5
        return a, torch.randn(rank, n, device=device).to(case.dtype)

    a, b = factors(sum(ranks))
    one_a, one_b = factors(RANK)
    x = torch.randn(rows, k, device=device, dtype=case.dtype)
    weight = torch.randn(n, k, device=device, dtype=case.dtype)
    ids = torch.randperm(rows).to(torch.int32).to(device)

    def each() -> torch.Tensor:
        return ops.lora_linear(x, weight, None, a, b, offsets=offsets, adapter_ids=ids)

    return {
        "ours": Contestant(lambda: each),
        "one_adapter": Contestant(lambda: lambda: ops.lora_linear(x, weight, None, one_a, one_b)),
        "base_alone": Contestant(lambda: lambda: F.linear(x, weight)),
    }


def every_kernel(dtypes: list[torch.dtype]) -> None:
    """The shapes and banks of the emulated tests, forward and backward."""
    tests = Path(__file__).resolve().parents[3] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cuda")]
    from test_emulated_lora_linear import bank, base

    shapes = [(1, 512, 1024), (9, 101, 67), (32, 512, 520), (70, 136, 130)]
    if has_wgmma("cuda"):
        shapes.append((4000, 1000, 1290))
    for dtype in dtypes:
        for rows, k, n in shapes:
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
