"""In the kernels of int8_lora_linear."""

from __future__ import annotations

from functools import partial

from .fault import Fault

_Fault = partial(Fault, "int8_lora_linear")

FAULTS = [
    _Fault(
        "boxes for a block that has not begun",
        "int8_wgmma.cuh",
        "    arrive_in_cluster();\n    wait_for_cluster();  // the barriers of both are there",
        "    __syncthreads();",
        ("nobody has made",),
    ),
    _Fault(
        "places of INT8 filled while the other block reads them",
        "int8_wgmma.cuh",
        "fetch_weight(k + kAhead - 1);",
        "fetch_weight(k + kAhead);",
        ("relative error", "deadlock", "one arrival more"),
    ),
    _Fault(
        "missing barrier of INT8 tiles",
        "int8_gemm.cuh",
        "    __syncthreads();\n    fetch(k + kStages - 1);",
        "    fetch(k + kStages - 1);",
        ("int8 tiled",),
    ),
    _Fault(
        "steps of INT8 in another order",
        "int8_skinny.cuh",
        "at = s * 16 + t * 4 + i;",
        "at = s * 16 + t + i * 4;",
        ("int8 few_rows", "int8 fused"),
    ),
    _Fault(
        "channels of B as they lie",
        "int8_gemm.cuh",
        "place / 32 * 32 + place % 8 * 4 + place % 32 / 8;",
        "place;",
        ("int8 tiled",),
    ),
    _Fault(
        "statistics read before all are there",
        "int8_rows.cuh",
        "    if (lane_ == 0) memory[warp_] = v;\n    __syncthreads();",
        "    if (lane_ == 0) memory[warp_] = v;",
        ("int8",),
    ),
    _Fault(
        "weight beyond its last block",
        "int8_gemm.cuh",
        "k * 16 + step < p_.w.steps && channel / 64 < p_.w.blocks();",
        "k * 16 + step < p_.w.steps;",
        ("heap-buffer-overflow", "lora_kernels::cuda::Int8Gemm<"),
        sanitized=True,
    ),
    _Fault(
        "registers of a product loaded while it reads them",
        "int8_wgmma.cuh",
        "wait_products<1>();  // those",
        "wait_products<2>();  // those",
        ("int8 tiled wgmma",),
    ),
    _Fault(
        "integers taken before they are done",
        "int8_wgmma.cuh",
        "    wait_products<0>();\n",
        "",
        ("int8 tiled wgmma",),
    ),
    _Fault(
        "places filled while products read them",
        "int8_wgmma.cuh",
        "tiles_ + k % kStages * Layout::kStageBytes",
        "tiles_ + k % (kStages - 1) * Layout::kStageBytes",
        ("int8 tiled wgmma",),
    ),
    _Fault(
        "places filled while the step before them is multiplied",
        "int8_wgmma.cuh",
        "      if (kDry) wait_products<0>();\n",
        "",
        ("int8 tiled wgmma",),
    ),
    _Fault(
        "words of k in another order",
        "int8_wgmma.cuh",
        "step * 8 + high * 4 + t)",
        "step * 8 + t * 2 + high)",
        ("int8 tiled wgmma",),
    ),
    _Fault(
        "channels of a fragment as they lie",
        "int8_wgmma.cuh",
        "at % 8 * kRun + at % kWarpColumns / 8;",
        "at % kWarpColumns;",
        ("int8 tiled wgmma",),
    ),
    Fault(
        "early_start",
        "rows read before they are there",
        "int8_rows.cuh",
        "    wait_for_kernel_before();\n    Shared shared;",
        "    Shared shared;",
        ("early start", "started early"),
    ),
    Fault(
        "early_start",
        "products that do not wait for their rows",
        "int8_skinny.cuh",
        "static_cast<int>(gridDim.x));\n    wait_for_kernel_before();",
        "static_cast<int>(gridDim.x));",
        ("started early", "early start"),
    ),
]
