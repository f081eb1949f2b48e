"""What the plans predict for the shapes that have figures to reach, on devices that are not here.

From bytes and FLOPs (csrc/cuda/lora_linear_plan.cpp), and no measurement. Needs the raw module::

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


def main() -> None:
    print("predicted, fp16, rank 16, cold caches: our time with LoRA, and over our base alone")
    print(f"{'':12}" + "".join(f"{'x'.join(map(str, shape)):>28}" for shape in SHAPES))
    for name, (arch, multiprocessors, clock, memory) in DEVICES.items():
        device = raw.on_cuda(
            raw.CudaDevice(
                arch=arch,
                multiprocessors=multiprocessors,
                clock_hz=clock,
                memory_bytes_per_second=memory,
                wgmma=arch == 90,
            )
        )
        cells = []
        for shape in SHAPES:
            ours, path = predicted(device, *shape, 16)
            base, _ = predicted(device, *shape, 0)
            cells.append(f"{ours:.1f} us x{ours / base:.2f} {path:>9}  ")
        print(f"{name:12}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    main()
