"""lora_linear against what people would use instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels import ops

from ..case import Aim, Case, Contestant, Function, absent

RANK = 16
# PEFT's step, forward and backward: what the fused operator has to save of it.
TRAINING_AIMS = (
    Aim("time", 1 / 1.4, "peft"),
    Aim("time", 1 / 1.2, "peft_compiled"),
    Aim("peak_bytes", 1.0, "peft"),
)
DECODE_AIMS = (Aim("time", 1.10, "base_alone"), Aim("bandwidth", 0.8))
OVER_BASE = (Aim("time", 1.05, "base_alone"),)
DROPOUT = 0.1  # of the cases that have it


def cases(dtype: torch.dtype) -> list[Case]:
    """Whisper large's and base's projections, by rows: decoding, an encoder window, a batch."""

    def shape(rows: int, k: int, n: int) -> dict[str, int]:
        return {"rows": rows, "in_features": k, "out_features": n}

    few = [
        Case(f"decode-{m}x{k}x{n}", shape(m, k, n), dtype, work, forward, DECODE_AIMS, graphs=True)
        for m in (1, 8, 32)
        for k, n in ((1280, 1280), (1280, 5120), (5120, 1280))
    ]
    over_base, of_steps = OVER_BASE, TRAINING_AIMS
    if has_wgmma("cuda"):  # what the plan takes it for; of a step, y and dx, not dA and dB
        over_base += (Aim("time", 0.85, "ours_mma"),)
        of_steps += (Aim("time", 0.85, "ours_mma"),)
    many = [
        Case(f"{m}x{k}x{n}", shape(m, k, n), dtype, work, forward, over_base)
        for m, k, n in (
            (4096, 1280, 1280),
            (12000, 1280, 1280),
            (12000, 1280, 5120),
            (1500, 512, 512),
        )
    ]
    steps = [
        Case(f"train-{m}x{k}x{n}", shape(m, k, n), dtype, work, training, of_steps, grad=True)
        for m, k, n in ((4096, 1280, 1280), (12000, 1280, 5120))
    ]
    masked = Case(
        "train-dropout-4096x1280x1280",
        shape(4096, 1280, 1280),
        dtype,
        work,
        training_with_dropout,
        (Aim("time", 1 / 1.4, "peft"), Aim("peak_bytes", 1.0, "peft")),
        grad=True,
    )
    mixed = [
        Case(
            f"mixed-32-adapters-{k}x{n}",
            shape(32, k, n),
            dtype,
            work_of_mixed,
            mixed_adapters,
            (Aim("time", 1.15, "one_adapter"),),
            graphs=True,
        )
        for k, n in ((1280, 1280), (1280, 5120))
    ]
    return [*mixed, *steps, masked, *many, *few, *in_other_types(dtype)]


def in_other_types(dtype: torch.dtype) -> list[Case]:
    """Few rows and many in fp16 and fp32, beside bf16: not where fp16 is all that there is."""
    if dtype != torch.bfloat16:
        return []
    found = []
    for other in (torch.float16, torch.float32):
        for m, k, n, aims in ((1, 1280, 5120, DECODE_AIMS), (4096, 1280, 1280, OVER_BASE)):
            shape = {"rows": m, "in_features": k, "out_features": n}
            name = f"{str(other)[6:]}-{m}x{k}x{n}"
            found.append(Case(name, shape, other, work, forward, aims, graphs=m <= 32))
    return found


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


def layer_of(case: Case, device: str) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear layer, A [rank, K] and B [N, rank]."""
    _, k, n = sizes(case)
    linear = torch.nn.Linear(k, n, dtype=case.dtype, device=device)
    a = torch.randn(RANK, k, device=device) / k**0.5
    b = torch.randn(n, RANK, device=device)
    return linear, a.to(case.dtype), b.to(case.dtype)


def with_peft(
    linear: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, dropout: float = 0.0
) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """PEFT's layer on the same tensors, and its factors, which take gradients."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False,
        lora_dropout=dropout,
    )  # fmt: skip
    model = get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].train()
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for factor, values in zip(factors, (a, b), strict=True):
        factor.data = values.detach()
    return layer, factors


def compiled(layer: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(layer)


def forward(case: Case, device: str) -> dict[str, Contestant]:
    """Ours, cuBLAS alone, cuBLAS with addmm_, merged weights, PEFT eager and compiled."""
    linear, a, b = layer_of(case, device)
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

    def peft() -> Function:
        layer, _ = with_peft(linear, a, b)
        return lambda: layer(x)

    def peft_compiled() -> Function:
        module = compiled(with_peft(linear, a, b)[0])
        return lambda: module(x)

    # Forcing asks the host, beside which many rows take long; few rows are captured, and alike.
    more = {"ours_mma": Contestant(lambda: ours_mma)} if has_wgmma(device) and rows > 32 else {}
    return {
        "ours": Contestant(lambda: ours),
        **more,
        "base_alone": Contestant(lambda: lambda: F.linear(x, weight, bias)),
        "addmm": Contestant(lambda: addmm),
        "merged": Contestant(lambda: lambda: F.linear(x, merged, bias)),
        "peft": Contestant(peft, absent=absent("peft")),
        "peft_compiled": Contestant(peft_compiled, compiled=True, absent=absent("peft")),
    }


def training(case: Case, device: str, dropout: float = 0.0) -> dict[str, Contestant]:
    """Forward and backward with a frozen base."""
    linear, a, b = layer_of(case, device)
    linear.requires_grad_(False)
    leaves = [a.requires_grad_(), b.requires_grad_()]
    rows, k, n = sizes(case)
    x = torch.randn(rows, k, device=device, dtype=case.dtype).requires_grad_()
    dy = torch.randn(rows, n, device=device, dtype=case.dtype)
    scale = torch.tensor([2.0], device=device)
    more = {"dropout_p": dropout} if dropout else {}

    def step(function: Callable[[], torch.Tensor], factors: Sequence[torch.Tensor]) -> Function:
        return lambda: torch.autograd.grad(function(), [x, *factors], dy)

    def ours() -> torch.Tensor:
        if dropout:  # as a layer draws it: anew for each step
            more["dropout_seed"] = torch.randint(2**62, (1,), device=device)
        return ops.lora_linear(x, linear.weight, linear.bias, a, b.t(), scales=scale, **more)

    def ours_mma() -> Function:
        taken = step(ours, leaves)

        def forced() -> object:
            with lk.force_implementation("cuda_mma"):
                return taken()

        return forced

    def peft() -> Function:
        layer, factors = with_peft(linear, a, b, dropout)
        return step(lambda: layer(x), factors)

    def peft_compiled() -> Function:
        layer, factors = with_peft(linear, a, b, dropout)
        module = compiled(layer)
        return step(lambda: module(x), factors)

    without_wgmma = {"ours_mma": Contestant(ours_mma)} if has_wgmma(device) else {}
    return {
        "ours": Contestant(lambda: step(ours, leaves)),
        **without_wgmma,
        "base_alone": Contestant(lambda: step(lambda: F.linear(x, linear.weight, linear.bias), [])),
        "peft": Contestant(peft, absent=absent("peft")),
        "peft_compiled": Contestant(peft_compiled, compiled=True, absent=absent("peft")),
    }


def training_with_dropout(case: Case, device: str) -> dict[str, Contestant]:
    """The same, with a mask on the branch's input that the backward pass draws again."""
    return training(case, device, DROPOUT)


def mixed_adapters(case: Case, device: str) -> dict[str, Contestant]:
    """A row for each adapter, of ranks 4 to 64, against all rows with one of their mean rank."""
    rows, k, n = sizes(case)
    ranks = ranks_of(rows)
    offsets = torch.tensor([0, *ranks]).cumsum(0).to(torch.int32).to(device)

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(rank, k, device=device).to(case.dtype) / k**0.5
        return a, torch.randn(rank, n, device=device).to(case.dtype)

    a, b = factors(sum(ranks))
    one_a, one_b = factors(sum(ranks) // len(ranks))
    x = torch.randn(rows, k, device=device, dtype=case.dtype)
    weight = torch.randn(n, k, device=device, dtype=case.dtype)
    ids = torch.randperm(rows).to(torch.int32).to(device)

    def each() -> torch.Tensor:
        return ops.lora_linear(
            x, weight, None, a, b, offsets=offsets, adapter_ids=ids, max_rank=max(ranks)
        )

    return {
        "ours": Contestant(lambda: each),
        "one_adapter": Contestant(lambda: lambda: ops.lora_linear(x, weight, None, one_a, one_b)),
        "base_alone": Contestant(lambda: lambda: F.linear(x, weight)),
    }


def every_kernel(dtypes: list[torch.dtype], device: str) -> None:
    """The banks of the emulated tests, forward and backward, at few rows and many."""
    call_sizes(call_each, (4000, 1000, 1290), dtypes, device)


def call_sizes(
    call: Callable[[tuple[int, int, int], torch.dtype, str], object],
    large: tuple[int, int, int],
    dtypes: list[torch.dtype],
    device: str,
) -> None:
    """Few rows and many, and a size that takes tiles of 128 x 128: by wgmma, and without."""
    for dtype in dtypes:
        for size in ((1, 512, 1024), (9, 101, 67), (32, 512, 520), (70, 136, 130), large):
            call(size, dtype, device)
        if has_wgmma(device):
            with lk.force_implementation("cuda_mma"):
                call(large, dtype, device)


def call_each(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    tests = Path(__file__).resolve().parents[3] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cuda")]
    from test_emulated_lora_linear import bank, base

    for mode in ("none", "peft", "bank", "dropout"):
        x, weight, bias, residual = (t.to(device) for t in base(*size, dtype))
        operands = {
            name: v.to(device) if isinstance(v, torch.Tensor) else v
            for name, v in bank(mode, *size, dtype).items()
        }
        leaves = [x, weight, bias]
        leaves += [operands[f] for f in ("lora_a", "lora_b") if f in operands]
        for leaf in leaves:
            leaf.requires_grad_()
        y = ops.lora_linear(x, weight, bias, residual=residual, activation="gelu", **operands)
        torch.autograd.grad(y.float().sum(), leaves)
