"""lora_linear against what people would use instead. One function per operator present."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .machine import Ceilings
from .timing import captured, in_turns, percentiles

RANK = 16


@dataclass(frozen=True)
class Case:
    """One shape, in the words of the figures that it has to reach."""

    name: str
    rows: int
    in_features: int
    out_features: int
    kind: str  # "forward", "training", "mixed" or "int8"
    dtype: torch.dtype = torch.bfloat16
    aim: tuple[str, float] | None = None  # contestant, largest ratio of our time to its


def cases(dtype: torch.dtype) -> list[Case]:
    """Whisper large's and base's projections, by rows: decoding, an encoder window, a batch."""
    few = [
        Case(f"decode-{rows}-{n}", rows, k, n, "forward", dtype, ("base_alone", 1.10))
        for rows in (1, 8, 32)
        for k, n in ((1280, 1280), (1280, 5120), (5120, 1280))
    ]
    many = [
        Case(f"{rows}x{k}x{n}", rows, k, n, "forward", dtype, ("base_alone", 1.05))
        for rows, k, n in (
            (4096, 1280, 1280),
            (12000, 1280, 1280),
            (12000, 1280, 5120),
            (1500, 512, 512),
        )
    ]
    training = [
        Case(f"train-{rows}x{k}x{n}", rows, k, n, "training", dtype, ("peft_compiled", 1 / 1.2))
        for rows, k, n in ((4096, 1280, 1280), (12000, 1280, 5120))
    ]
    int8 = [
        Case(
            f"int8-{rows}x{k}x{n}",
            rows,
            k,
            n,
            "int8",
            dtype,
            ("merged", 1 / 1.5 if rows > 32 else 1.0),
        )
        for rows, k, n in (
            (1, 1280, 5120),
            (16, 1280, 5120),
            (4096, 1280, 5120),
            (4096, 5120, 1280),
        )
    ]
    mixed = [Case("mixed-32-adapters", 32, 1280, 5120, "mixed", dtype, ("one_adapter", 1.15))]
    return few + many + training + mixed + int8


class Layer(torch.nn.Module):
    """PEFT's own formula, for machines without PEFT."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.a), self.b) * 2.0


def peft_layer(case: Case) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, str]:
    """A LoRA layer of rank 16, its two factors, and whose it is."""
    k, n = case.in_features, case.out_features
    linear = torch.nn.Linear(k, n, dtype=case.dtype, device="cuda")
    if importlib.util.find_spec("peft") is None:
        a = torch.randn(RANK, k, device="cuda", dtype=case.dtype) / k**0.5
        b = torch.randn(n, RANK, device="cuda", dtype=case.dtype)
        layer = Layer(linear, a, b)
        return layer, layer.a, layer.b, "the eager formula; peft is not installed"
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
    peft = model.base_model.model[0]
    return peft, peft.lora_A["default"].weight, peft.lora_B["default"].weight, "peft"


def forward(case: Case, ops: Any) -> dict[str, Callable[[], object]]:
    """Ours, cuBLAS alone, cuBLAS with addmm_, PEFT eager and compiled, merged weights."""
    layer, a, b, _ = peft_layer(case)
    linear = layer.base_layer
    x = torch.randn(case.rows, case.in_features, device="cuda", dtype=case.dtype)
    weight, bias, scale = linear.weight, linear.bias, torch.tensor([2.0], device="cuda")
    merged = (weight + 2.0 * b @ a).detach()
    scaled_b, down = (2.0 * b.t()).contiguous(), a.t()

    def addmm() -> torch.Tensor:
        return F.linear(x, weight, bias).addmm_(x @ down, scaled_b)

    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.lora_linear(x, weight, bias, a, b.t(), scales=scale),
        "base_alone": lambda: F.linear(x, weight, bias),
        "addmm": addmm,
        "merged": lambda: F.linear(x, merged, bias),
        "peft": lambda: layer(x),
    }
    if case.rows <= 32:  # as decoders call them: launches do not count
        functions = {name: captured(function) for name, function in functions.items()}
    compiled = torch.compile(layer, fullgraph=False)
    compiled(x)
    return functions | {"peft_compiled": lambda: compiled(x)}


def training(case: Case, ops: Any) -> dict[str, Callable[[], object]]:
    """Forward and backward with a frozen base."""
    layer, a, b, _ = peft_layer(case)
    linear = layer.base_layer.requires_grad_(False)
    x = torch.randn(case.rows, case.in_features, device="cuda", dtype=case.dtype).requires_grad_()
    dy = torch.randn(case.rows, case.out_features, device="cuda", dtype=case.dtype)
    scale = torch.tensor([2.0], device="cuda")
    compiled = torch.compile(layer)

    def step(function: Callable[[], torch.Tensor], leaves: list) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(function(), leaves, dy)

        return run

    return {
        "ours": step(
            lambda: ops.lora_linear(x, linear.weight, linear.bias, a, b.t(), scales=scale),
            [x, a, b],
        ),
        "base_alone": step(lambda: F.linear(x, linear.weight, linear.bias), [x]),
        "peft": step(lambda: layer(x), [x, a, b]),
        "peft_compiled": step(lambda: compiled(x), [x, a, b]),
    }


def mixed(case: Case, ops: Any) -> dict[str, Callable[[], object]]:
    """A row for each of 32 adapters, of ranks 4 to 64, against all rows with one of rank 16."""
    k, n = case.in_features, case.out_features
    ranks = [4 + 60 * i // 31 for i in range(32)]
    offsets = torch.tensor([0, *ranks]).cumsum(0).to(torch.int32).cuda()

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(rank, k, device="cuda").to(case.dtype) / k**0.5
        return a, torch.randn(rank, n, device="cuda").to(case.dtype)

    a, b = factors(sum(ranks))
    one_a, one_b = factors(RANK)
    x = torch.randn(32, k, device="cuda", dtype=case.dtype)
    weight = torch.randn(n, k, device="cuda", dtype=case.dtype)
    ids = torch.randperm(32).to(torch.int32).cuda()

    def each() -> torch.Tensor:
        return ops.lora_linear(x, weight, None, a, b, offsets=offsets, adapter_ids=ids)

    functions: dict[str, Callable[[], object]] = {
        "ours": each,
        "one_adapter": lambda: ops.lora_linear(x, weight, None, one_a, one_b),
        "base_alone": lambda: F.linear(x, weight),
    }
    return {name: captured(function) for name, function in functions.items()}


def int8(case: Case, ops: Any) -> dict[str, Callable[[], object]]:
    """Ours with a live adapter; torch._int_mm and the eager rest; torchao; bf16 merged cuBLAS."""
    m, k, n = case.rows, case.in_features, case.out_features
    x = torch.randn(m, k, device="cuda", dtype=case.dtype)
    weight = torch.randn(n, k, device="cuda") / k**0.5
    scales = weight.abs().amax(1) / 127
    q = (weight / scales.unsqueeze(1)).round().to(torch.int8)
    packed, columns, merged = ops.int8_pack(q, scales), q.t(), weight.to(case.dtype)
    a = torch.randn(RANK, k, device="cuda", dtype=case.dtype) / k**0.5
    b = torch.randn(RANK, n, device="cuda", dtype=case.dtype)

    def int_mm() -> torch.Tensor:
        row_scales = x.abs().amax(1, keepdim=True).float() / 127
        rows = (x / row_scales).round().to(torch.int8)
        base = torch._int_mm(rows, columns).float() * (row_scales * scales)
        return base.to(case.dtype).addmm_(x @ a.t(), b)

    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.int8_lora_linear(x, packed, n, None, a, b),
        "without_lora": lambda: ops.int8_lora_linear(x, packed, n),
        "merged": lambda: F.linear(x, merged),
    }
    if m > 16:  # what torch._int_mm takes
        functions["int_mm"] = int_mm
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        linear = torch.nn.Sequential(torch.nn.Linear(k, n, False, "cuda", case.dtype))
        quantize_(linear, Int8DynamicActivationInt8WeightConfig())
        functions["torchao"] = torch.compile(lambda: linear(x).addmm_(x @ a.t(), b))
    return functions if m > 32 else {name: captured(f) for name, f in functions.items()}


def work_of(case: Case) -> tuple[float, float]:
    """The fewest bytes and the operations of a case."""
    m, k, n = case.rows, case.in_features, case.out_features
    size = torch.empty(0, dtype=case.dtype).element_size()
    rank = sum(4 + 60 * i // 31 for i in range(32)) if case.kind == "mixed" else RANK
    moved = (n * k + rank * (n + k) + m * (n + k)) * size
    operations = 2.0 * m * n * k + 2.0 * m * RANK * (n + k)
    if case.kind == "int8":  # twice the rate of 16 bits, which the ceilings have measured
        moved = n * k + (RANK * (n + k) + m * (n + k)) * size
        operations = 1.0 * m * n * k + 2.0 * m * RANK * (n + k)
    if case.kind == "training":
        return 2.0 * moved + m * (n + k) * size, 2 * operations + 4.0 * m * RANK * (n + k)
    return float(moved), operations


def peak_bytes(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run(ops: Any, ceilings: Ceilings, dtype: torch.dtype, deadline: float) -> Iterator[dict]:
    """Results, one after another, until the deadline (of time.perf_counter())."""
    makers = {"forward": forward, "training": training, "mixed": mixed, "int8": int8}
    remaining = cases(dtype)
    for index, case in enumerate(remaining):
        left = deadline - time.perf_counter()
        if left < 5:
            yield {"name": case.name, "skipped": "no time was left"}
            continue
        torch._dynamo.reset()
        with torch.no_grad():
            contestants = makers[case.kind](case, ops)
            samples = in_turns(contestants, min(3.0, left / (2 * (len(remaining) - index))))
        moved, operations = work_of(case)
        times = {name: percentiles(values) for name, values in samples.items()}
        ours = times["ours"]["p50_us"]
        limit = ceilings.roofline_us(moved, operations, case.dtype)
        result: dict[str, Any] = {
            "name": case.name,
            "dtype": str(case.dtype)[6:],
            "rounds": len(samples["ours"]),
            "bytes": moved,
            "operations": operations,
            "roofline_us": limit,
            "roofline_fraction": limit / ours,
            "times": times,
            "ratio": {name: ours / t["p50_us"] for name, t in times.items() if name != "ours"},
        }
        if case.kind == "training":
            result["peak_bytes"] = {name: peak_bytes(f) for name, f in contestants.items()}
        if case.aim:
            peer, most = case.aim
            reached = result["ratio"][peer] <= most
            result["aim"] = {"against": peer, "at_most": most, "reached": reached}
        yield result
