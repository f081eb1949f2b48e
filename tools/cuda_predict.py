"""What the plans predict for the shapes that have figures to reach, on devices that are not here.

From bytes and FLOPs (csrc/cuda/*_plan.cpp), and no measurement. Needs the raw module::

    cmake -S . -B build/raw -DLORA_KERNELS_RAW=ON && cmake --build build/raw --target _raw
    PYTHONPATH=build/raw python tools/cuda_predict.py
"""

from __future__ import annotations

import re

import _raw as raw  # type: ignore[import-not-found]

# Architecture, multiprocessors, clock in Hz, bytes per second: data sheets.
DEVICES = {
    "T4": (75, 40, 1.59e9, 320e9),
    "A100 40 GB": (80, 108, 1.41e9, 1555e9),
    "A10": (86, 72, 1.695e9, 600e9),
    "L4": (89, 58, 2.04e9, 300e9),
    "H100 SXM": (90, 132, 1.755e9, 3350e9),
    "H200": (90, 132, 1.755e9, 4800e9),
    "B200": (100, 148, 1.85e9, 8000e9),
    "RTX 5090": (120, 170, 2.41e9, 1792e9),
}
# KiB of shared memory that a block may have; of others 99.
SHARED = {75: 64, 80: 163, 90: 227, 100: 227}
SHAPES = [(m, k, n) for m in (1, 32) for k, n in ((1280, 1280), (1280, 5120), (5120, 1280))]
SHAPES += [(4096, 1280, 1280), (12000, 1280, 5120)]


def lora_of(rank: int, adapters: int = 1, total_rank: int | None = None) -> raw.LoraShape:
    """One adapter of this rank; or several, with a group of rows each, of this rank at most."""
    return raw.LoraShape(
        adapters=adapters if rank else 0,
        total_rank=rank if total_rank is None else total_rank,
        max_rank=rank,
        groups=adapters if adapters > 1 else 0,
        dtype=raw.DType.float16,
    )


def linear(rows: int, k: int, n: int, lora: raw.LoraShape, **more: object) -> raw.LoraLinearProblem:
    return raw.LoraLinearProblem(
        rows=rows, in_features=k, out_features=n, dtype=raw.DType.float16, lora=lora, **more
    )


def int8_linear(rows: int, k: int, n: int, rank: int, **more: object) -> raw.Int8LoraLinearProblem:
    return raw.Int8LoraLinearProblem(
        rows=rows,
        in_features=k,
        out_features=n,
        dtype=raw.DType.float16,
        lora=lora_of(rank),
        **more,
    )


def predicted(device: raw.DeviceInfo, rows: int, k: int, n: int, rank: int) -> tuple[float, str]:
    """µs, and the path."""
    text = str(raw.plan(linear(rows, k, n, lora_of(rank)), device))
    found = re.search(r"cuda sm_\d+ (\w+) (wgmma)?.*predicted=([\d.]+)us", text)
    assert found, text
    return float(found[3]), found[2] or found[1]


def microseconds(device: raw.DeviceInfo, problem: object) -> float:
    text = str(raw.plan(problem, device))
    found = re.search(r"predicted=([\d.]+)us", text)
    assert found, text
    return float(found[1])


def int8_predicted(device: raw.DeviceInfo, rows: int, k: int, n: int) -> tuple[float, float]:
    """µs with a live adapter of rank 16, and the fewest bytes in it over the memory's peak."""
    us = microseconds(device, int8_linear(rows, k, n, 16))
    moved = n * k + (16 * (n + k) + rows * (n + k)) * 2
    return us, moved / (us * 1e-6) / device.cuda.memory_bytes_per_second


def kv_predicted(
    device: raw.DeviceInfo, utterances: int, beams: int, positions: int, int8: bool
) -> tuple[float, float]:
    """µs of a step of Whisper large-v3 (20 heads of 64), and the part of the memory's peak.

    448 positions: self-attention with its append, at the end of its cache. 1,500: cross-attention.
    """
    append = positions == 448
    problem = raw.KvAttentionStepProblem(
        rows=utterances * beams, heads=20, head_size=64, cache_rows=utterances,
        capacity=positions, dtype=raw.DType.float16, append=append,
        cache_dtype=raw.DType.int8 if int8 else raw.DType.float16,
    )  # fmt: skip
    if int8:
        problem.scales, problem.layout = raw.KvScales.per_channel, raw.KvLayout.blocked
    if not append:
        problem.slots = raw.KvSlots.per_row
    us = microseconds(device, problem)
    moved = 2 * utterances * 20 * positions * 64 * (1 if int8 else 2)
    return us, moved / (us * 1e-6) / device.cuda.memory_bytes_per_second


# FLOPs of a multiprocessor per clock, 16 bits; what a library's products are taken to reach of
# them, a copy of the memory's peak, and what a launch costs (as csrc/cuda/machine.h has it).
PEAK = {75: 1024, 80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 120: 1024}
LIBRARY, MEMORY, LAUNCH_US = 0.8, 0.85, 2.5


class Peer:
    """Kernels one after another, as torch launches them: each its bytes or its FLOPs."""

    def __init__(self, device: raw.DeviceInfo) -> None:
        cuda = device.cuda
        peak = PEAK[cuda.arch] * cuda.multiprocessors * cuda.clock_hz
        self._flops, self._bytes = LIBRARY * peak, MEMORY * cuda.memory_bytes_per_second
        self.us = 0.0

    def product(self, m: int, n: int, k: int) -> None:
        """[m, k] by [k, n] in 16 bits."""
        moved = 2 * (m * k + k * n + m * n)
        self.us += max(2 * m * n * k / self._flops, moved / self._bytes) * 1e6 + LAUNCH_US

    def pointwise(self, elements: int) -> None:
        """So many elements read and written."""
        self.us += 2 * elements / self._bytes * 1e6 + LAUNCH_US


def many_rows_predicted(
    device: raw.DeviceInfo, m: int, k: int, n: int, gelu: bool
) -> tuple[float, float, float, float]:
    """µs of INT8 with a live adapter of rank 16. Of that: the part of the INT8 peak, the adapter's
    share, how often it goes into a library's product in bf16 of merged weights, activation free.
    """
    more = {"activation": raw.Activation.gelu} if gelu else {}
    us = microseconds(device, int8_linear(m, k, n, 16, **more))
    base = microseconds(device, int8_linear(m, k, n, 0, **more))
    cuda = device.cuda
    peak = 2 * PEAK[cuda.arch] * cuda.multiprocessors * cuda.clock_hz
    merged = Peer(device)
    merged.product(m, n, k)
    return us, 2 * m * n * k / peak / (us * 1e-6), 1 - base / us, merged.us / us


def peft_predicted(
    device: raw.DeviceInfo, m: int, k: int, n: int, rank: int, compiled: bool
) -> float:
    """µs of forward and backward of PEFT's layer without dropout, its weight frozen.

    Eager: base, A, B, times the scale, plus the base; then dy times the scale, dB, dt, dA, dt A,
    dy W, and their sum. Compiled, scale and sum of the forward pass are one kernel.
    """
    peer = Peer(device)
    for shape in ((m, n, k), (m, rank, k), (m, n, rank)):
        peer.product(*shape)
    for elements in [3 * m * n] if compiled else [2 * m * n, 3 * m * n]:
        peer.pointwise(elements)
    peer.pointwise(2 * m * n)
    for shape in ((n, rank, m), (m, rank, n), (rank, k, m), (m, k, rank), (m, k, n)):
        peer.product(*shape)
    peer.pointwise(3 * m * k)
    return peer.us


def training_predicted(device: raw.DeviceInfo, m: int, k: int, n: int, rank: int) -> float:
    """µs of our forward and backward: dx, dA, dB, from a t that the forward pass hands over."""
    problem = linear(m, k, n, lora_of(rank), keeps_t=True)
    backward = raw.LoraLinearBackwardProblem(
        forward=problem, needs_dx=True, needs_dlora=True, has_t=True
    )
    return microseconds(device, problem) + microseconds(device, backward)


def mixed_predicted(device: raw.DeviceInfo, k: int, n: int) -> float:
    """Time of 32 rows with 32 adapters of ranks 4 to 64 over that with one of their mean rank."""
    ranks = [4 + 60 * i // 31 for i in range(32)]
    mixed = linear(32, k, n, lora_of(max(ranks), len(ranks), sum(ranks)))
    one = linear(32, k, n, lora_of(sum(ranks) // len(ranks)))
    return microseconds(device, mixed) / microseconds(device, one)


# Whisper large-v3.
WIDTH, INNER, LAYERS, VOCABULARY = 1280, 5120, 32, 51866


def step_of_transformers(device: raw.DeviceInfo, batch: int, peft: bool) -> float:
    """µs of the same step in 16 bits by transformers, each kernel after the one before.

    With PEFT, eager: three norms, eight linears of five kernels each (base, A, B, times the scale,
    plus), a cache that is copied as it grows, two attentions, GELU, three residual sums. Without,
    a static cache under torch.compile: pointwise kernels merge with each other. What the host
    takes for a kernel, often longer than the kernel, is not counted.
    """
    peer = Peer(device)
    d, one = WIDTH, batch * WIDTH
    for k, n in [(d, d)] * 6 + [(d, INNER), (INNER, d)]:
        peer.product(batch, n, k)
        if peft:
            peer.product(batch, 16, k)
            peer.product(batch, n, 16)
            peer.pointwise(batch * n)
            peer.pointwise(batch * n)
    own, cross = 2 * 448 * one, 2 * 1500 * one  # elements of K and V
    for elements in (one,) * 3 + ((one,) * 3 + (batch * INNER, own, own) if peft else (one,)):
        peer.pointwise(elements)
    for read in (own, cross):
        peer.pointwise(read)
    us = LAYERS * peer.us
    choice = Peer(device)
    choice.product(batch, VOCABULARY, d)
    choice.pointwise(batch * VOCABULARY)
    return us + choice.us


def step_predicted(device: raw.DeviceInfo, batch: int) -> tuple[float, float]:
    """µs of a greedy step of Whisper large-v3 in INT8, adapters of rank 16 live on all projections,
    and over what its bytes take; at the end of its positions, kernel after kernel.
    """
    d, ffn = WIDTH, INNER

    def product(n: int, k: int, rank: int, **more: object) -> tuple[float, float]:
        problem = int8_linear(batch, k, n, rank, has_bias=True, **more)
        return microseconds(device, problem), n * k + 2 * rank * (n + k)

    def attention(positions: int, int8: bool) -> tuple[float, float]:
        us, _ = kv_predicted(device, batch, 1, positions, int8)
        return us, 2 * batch * d * positions * (1 if int8 else 2)

    layer = [
        # q, k and v in one launch, whose blocks make t for their own 16 ranks.
        product(3 * d, d, 16, has_norm=True),
        attention(448, int8=False),
        product(d, d, 16, has_residual=True),
        product(d, d, 16, has_norm=True),
        attention(1500, int8=True),
        product(d, d, 16, has_residual=True),
        product(ffn, d, 16, has_norm=True, activation=raw.Activation.gelu),
        product(d, ffn, 16, has_residual=True),
    ]
    choice = product(VOCABULARY, d, 0, has_norm=True, top_k=1)
    us, moved = (
        LAYERS * sum(of_layer) + of_choice
        for of_layer, of_choice in zip(zip(*layer, strict=True), choice, strict=True)
    )
    return us, us / (moved / (MEMORY * device.cuda.memory_bytes_per_second) * 1e6)


TRAINING = [(4096, 1280, 1280), (12000, 1280, 5120)]
INT8_SHAPES = [(1, 1280, 1280), (1, 1280, 5120), (16, 1280, 5120), (4096, 1280, 5120)]
# Of many rows, and whether GELU follows.
INT8_MANY = [((4096, 1280, 5120), gelu) for gelu in (False, True)]
INT8_MANY += [((4096, 5120, 1280), False), ((12000, 5120, 1280), False)]
# Utterances, beams, positions, INT8.
KV_STEPS = [(1, 1, 448, False), (16, 1, 448, False), (1, 1, 1500, True), (16, 1, 1500, False)]
KV_STEPS += [(16, 1, 1500, True), (16, 5, 1500, True)]


def main() -> None:
    devices = {
        name: raw.on_cuda(
            raw.CudaDevice(
                arch=arch,
                multiprocessors=multiprocessors,
                clock_hz=clock,
                memory_bytes_per_second=memory,
                shared_bytes=SHARED.get(arch, 99) << 10,
                wgmma=arch == 90,
                clusters=arch >= 90,
            )
        )
        for name, (arch, multiprocessors, clock, memory) in DEVICES.items()
    }
    print("predicted, fp16, rank 16, cold caches: our time with LoRA, and over our base alone")
    print(f"{'':12}" + "".join(f"{'x'.join(map(str, shape)):>28}" for shape in SHAPES))
    for name, device in devices.items():
        cells = []
        for shape in SHAPES:
            ours, path = predicted(device, *shape, 16)
            base, _ = predicted(device, *shape, 0)
            cells.append(f"{ours:.1f} us x{ours / base:.2f} {path:>9}  ")
        print(f"{name:12}" + "".join(f"{cell:>28}" for cell in cells))
    print("\npredicted: forward and backward, fp16, rank 16; PEFT eager and compiled over it")
    print(f"{'':12}" + "".join(f"{'x'.join(map(str, shape)):>28}" for shape in TRAINING))
    for name, device in devices.items():
        cells = []
        for shape in TRAINING:
            us = training_predicted(device, *shape, 16)
            eager, compiled = (peft_predicted(device, *shape, 16, c) for c in (False, True))
            cells.append(f"{us:.0f} us  x{eager / us:.2f} x{compiled / us:.2f}  ")
        print(f"{name:12}" + "".join(f"{cell:>28}" for cell in cells))
    print("\npredicted: 32 rows with 32 adapters of ranks 4 to 64 over one of their mean rank")
    for name, device in devices.items():
        found = [mixed_predicted(device, k, n) for k, n in ((1280, 1280), (1280, 5120))]
        print(f"{name:12}" + "".join(f"x{ratio:.2f}  " for ratio in found))
    print(
        "\npredicted: a step of Whisper large-v3 by batch, over what its bytes take; "
        "transformers with PEFT, and static and compiled, over it"
    )
    print(f"{'':12}" + "".join(f"{batch:>34}" for batch in (1, 4, 16)))
    for name, device in devices.items():
        cells = []
        for batch in (1, 4, 16):
            us, over = step_predicted(device, batch)
            eager, compiled = (step_of_transformers(device, batch, peft) for peft in (True, False))
            cells.append(f"{us:.0f} us x{over:.2f}; x{eager / us:.1f} x{compiled / us:.1f}")
        print(f"{name:12}" + "".join(f"{cell:>34}" for cell in cells))
    print("\npredicted: int8_lora_linear, and the part of the memory's peak that this is")
    print(f"{'':12}" + "".join(f"{'x'.join(map(str, shape)):>18}" for shape in INT8_SHAPES))
    for name, device in devices.items():
        found = [int8_predicted(device, *shape) for shape in INT8_SHAPES]
        print(f"{name:12}" + "".join(f"{us:>8.1f} us {100 * part:>3.0f} %  " for us, part in found))
    print(
        "\npredicted: int8_lora_linear of many rows; part of the INT8 peak, the adapter's share, "
        "a merged bf16 product over it"
    )
    print(
        f"{'':12}"
        + "".join(f"{'x'.join(map(str, s)) + ' gelu' * gelu:>34}" for s, gelu in INT8_MANY)
    )
    for name, device in devices.items():
        cells = []
        for shape, gelu in INT8_MANY:
            us, peak, share, merged = many_rows_predicted(device, *shape, gelu)
            cells.append(f"{us:.1f} us {100 * peak:.0f} % {100 * share:.1f} % x{merged:.2f}")
        print(f"{name:12}" + "".join(f"{cell:>34}" for cell in cells))
    print("\npredicted: kv_attention_step, 20 heads of 64, by utterances, beams and positions")
    print(
        f"{'':12}"
        + "".join(f"{f'{u}x{b}x{p}' + (' int8' if i else ''):>18}" for u, b, p, i in KV_STEPS)
    )
    for name, device in devices.items():
        found = [kv_predicted(device, *step) for step in KV_STEPS]
        print(f"{name:12}" + "".join(f"{us:>8.1f} us {100 * part:>3.0f} %  " for us, part in found))


if __name__ == "__main__":
    main()
