"""One INT8 projection: what a live adapter adds to it, and torch's dynamic INT8 beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lora_kernels import ops
from lora_kernels.benchmarking import torch_int8
from lora_kernels.benchmarking.cold import copies, cycling
from lora_kernels.reference import quantize_weight
from lora_speech.bench.measure import Contestant, compare, significant
from lora_speech.bench.record import Record
from lora_speech.bench.settings import RANK, BenchSettings

ROWS = (1, 1500)
"""A decoding step, and a window of 30 s in the encoder."""

SHARE = 0.1
"""Of a comparison's time: there are many of these, of a few microseconds or milliseconds each."""

DISTINCT = 8
"""Weights that differ; more copies of them only put them out of cache."""


def compare_linears(
    key: str, config: Any, threads: int, settings: BenchSettings, record: Record
) -> None:
    """Microseconds per call for the three shapes that a Whisper's layers are made of."""
    torch.set_num_threads(threads)
    width, inner = config.d_model, config.encoder_ffn_dim
    shapes = {"q_proj": (width, width), "fc1": (width, inner), "fc2": (inner, width)}
    for layer, (inputs, outputs) in shapes.items():
        for rows in ROWS:
            counter = record.progress.counter(
                f"linear {key} {layer}, rows {rows}, threads {threads}"
            )
            contestants = _contestants(inputs, outputs, rows)
            with torch.inference_mode():
                result = compare(contestants, settings, counter, share=SHARE)
            figures = record.add(
                ("linear", key, str(threads), layer, str(rows)),
                result,
                lambda seconds: seconds * 1e6,
            )
            figures["lora_over_int8"] = significant(result.ratio("int8_lora", "int8"))


def _contestants(inputs: int, outputs: int, rows: int) -> list[Contestant]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / inputs**0.5

    # One call at many rows takes the weight from cache whatever was there before.
    count = 1 if rows > 100 else copies(inputs * outputs)
    x, bias, scale = random(rows, inputs), random(outputs), torch.tensor([2.0])
    weights = [random(outputs, inputs) for _ in range(min(count, DISTINCT))]
    packed = [ops.int8_pack(*quantize_weight(weight)) for weight in weights]
    lora = [(random(RANK, inputs), random(RANK, outputs)) for _ in weights]
    alone = [(None, None)] * len(weights)

    def contestant(
        name: str, call: Callable[..., Any], heads: list, tails: list, variant: str = ""
    ) -> Contestant:
        operands = [(heads[i % len(heads)], *tails[i % len(tails)]) for i in range(count)]
        once = cycling(call, operands)

        def run() -> None:
            for _ in range(count):
                once()

        return Contestant(name, run, variant, count)

    def ours(weight: Any, a: Any, b: Any) -> Any:
        scales = None if a is None else scale
        return ops.int8_lora_linear(x, weight, outputs, bias, a, b, scales=scales)

    found = [
        contestant("int8", ours, packed, alone),
        contestant("int8_lora", ours, packed, lora),
    ]
    for engine in torch_int8.ENGINES:

        def theirs(weight: Any, a: Any, b: Any, engine: str = engine) -> Any:
            y = torch_int8.linear(x, weight, engine)
            return y if a is None else y + F.linear(F.linear(x, a), b.t()) * 2.0

        heads = [torch_int8.pack(weight, bias, engine) for weight in weights]
        found.append(contestant("torch_dynamic_int8", theirs, heads, alone, engine))
        found.append(contestant("torch_dynamic_int8_lora", theirs, heads, lora, engine))
    return found
