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
    _Fault(
        "sums sent to a block that has not begun",
        "int8_exchange.cuh",
        "    wait_for_cluster();  // the barriers of all are there\n",
        "",
        ("nobody has made", "ends before", "arrives in its cluster"),
    ),
    _Fault(
        "sums of other blocks read before they are there",
        "int8_exchange.cuh",
        "    wait_for_phase(arrived_, 0);\n",
        "",
        ("int8 clustered", "int8 fused", "ends while"),
    ),
    _Fault(
        "sums sent to the block that finishes others",
        "int8_exchange.cuh",
        "static_cast<unsigned>(n / channels_));",
        "static_cast<unsigned>(n % blocks_));",
        ("int8 clustered", "int8 fused", "deadlock"),
    ),
    _Fault(
        "rows quantized before they have landed",
        "int8_rows.cuh",
        "    wait_copies<1>();  // all but A, and what a caller asked for\n",
        "",
        ("int8",),
    ),
    _Fault(
        "A multiplied before it has landed",
        "int8_rows.cuh",
        "    wait_copies<0>();\n    __syncthreads();",
        "    __syncthreads();",
        ("int8",),
    ),
    _Fault(
        "pieces of w as they lie",
        "int8_skinny.cuh",
        "(piece ^ line / 4 % 4 * 2) * 16",
        "piece * 16",
        ("int8 fused",),
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
        "rows, t_stride);\n    wait_for_kernel_before();",
        "rows, t_stride);",
        ("started early", "early start"),
    ),
]
