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
SHAPES = [(m, k, n) for m in (1, 32) for k, n in ((1280, 1280), (1280, 5120), (5120, 1280))]
SHAPES += [(4096, 1280, 1280), (12000, 1280, 5120)]


def predicted(device: raw.DeviceInfo, rows: int, k: int, n: int, rank: int) -> tuple[float, str]:
    """µs, and the path."""
    dtype = raw.DType.float16
    problem = raw.LoraLinearProblem(rows=rows, in_features=k, out_features=n, dtype=dtype)
    if rank:
        problem.lora = raw.LoraShape(adapters=1, total_rank=rank, max_rank=rank, dtype=dtype)
    text = str(raw.plan(problem, device))
    found = re.search(r"cuda sm_\d+ (\w+) (wgmma)?.*predicted=([\d.]+)us", text)
    assert found, text
    return float(found[3]), found[2] or found[1]


def microseconds(text: str) -> float:
    found = re.search(r"predicted=([\d.]+)us", text)
    assert found, text
    return float(found[1])


def int8_predicted(device: raw.DeviceInfo, rows: int, k: int, n: int) -> tuple[float, float]:
    """µs with a live adapter of rank 16, and the fewest bytes in it over the memory's peak."""
    dtype = raw.DType.float16
    problem = raw.Int8LoraLinearProblem(rows=rows, in_features=k, out_features=n, dtype=dtype)
    problem.lora = raw.LoraShape(adapters=1, total_rank=16, max_rank=16, dtype=dtype)
    us = microseconds(str(raw.plan(problem, device)))
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
    us = microseconds(str(raw.plan(problem, device)))
    moved = 2 * utterances * 20 * positions * 64 * (1 if int8 else 2)
    return us, moved / (us * 1e-6) / device.cuda.memory_bytes_per_second


INT8_SHAPES = [(1, 1280, 1280), (1, 1280, 5120), (16, 1280, 5120), (4096, 1280, 5120)]
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
                wgmma=arch == 90,
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
    print("\npredicted: int8_lora_linear, and the part of the memory's peak that this is")
    print(f"{'':12}" + "".join(f"{'x'.join(map(str, shape)):>18}" for shape in INT8_SHAPES))
    for name, device in devices.items():
        found = [int8_predicted(device, *shape) for shape in INT8_SHAPES]
        print(f"{name:12}" + "".join(f"{us:>8.1f} us {100 * part:>3.0f} %  " for us, part in found))
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
