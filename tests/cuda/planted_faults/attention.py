"""In the kernels of kv_attention_step, kv_pack and kv_relative_step."""

from __future__ import annotations

from functools import partial

from .fault import Fault

_Fault = partial(Fault, "kv_attention_step")

FAULTS = [
    _Fault(
        "sums of warps read before all are there",
        "kv_attend.cuh",
        "    parts_.store(most_, total_, sums_);\n    __syncthreads();",
        "    parts_.store(most_, total_, sums_);",
        ("kv",),
    ),
    _Fault(
        "places read before all are found",
        "kv_attend.cuh",
        "append(row);\n      __syncthreads();",
        "append(row);",
        ("kv",),
    ),
    _Fault(
        "new tokens of other rows read from the cache",
        "kv_rows.cuh",
        "p >= first_new && place >= 0",
        "p > rows.capacity && place >= 0",
        ("kv steps", "others' new tokens"),
    ),
    _Fault(
        "channels of V as they lie",
        "kv_result.cuh",
        "j / 8 * 64 + (2 * t + e) * 8 + j % 8",
        "j * 8 + 2 * t + e",
        ("kv",),
    ),
    _Fault(
        "positions of blocked scores as they lie",
        "kv_blocked.cuh",
        "const int position = at + 8 * t_ + 4 * e + j;",
        "const int position = at + 8 * j + 2 * t_ + e;",
        ("kv blocked",),
    ),
    _Fault(
        "halves of weights exchanged",
        "kv_blocked.cuh",
        "128 * sum[e] + sum[2 + e]",
        "128 * sum[2 + e] + sum[e]",
        ("kv blocked",),
    ),
    _Fault(
        "sums that no larger score scales",
        "kv_attend.cuh",
        "sums_[j][2 * i] *= share, sums_[j][2 * i + 1] *= share;",
        "sums_[j][2 * i] *= 1, sums_[j][2 * i + 1] *= 1;",
        ("kv",),
    ),
    _Fault(
        "what one query does not see reaches it",
        "kv_attend.cuh",
        "if (g_ + 8 * (e / 2) != only) sums_",
        "if (false) sums_",
        ("kv steps", "not see"),
    ),
    Fault(
        "kv_relative_step",
        "sums of a chunk's warps read before all are there",
        "kv_relative_step.cuh",
        "    parts_.store(most_, total_, sums_);\n    __syncthreads();",
        "    parts_.store(most_, total_, sums_);",
        ("kv relative",),
    ),
    Fault(
        "kv_relative_step",
        "queries of a chunk read before all are there",
        "kv_relative_step.cuh",
        "    by_distance_.meet();",
        "    // by_distance_.meet();",
        ("nothing has written", "kv relative"),
    ),
    Fault(
        "kv_relative_step",
        "row of P of the distance beside",
        "kv_relative_step.cuh",
        "kKvQueries - 1 + place - query",
        "kKvQueries + place - query",
        ("kv relative",),
    ),
    Fault(
        "kv_relative_step",
        "frames of the chunk read from the ring",
        "kv_relative_step.cuh",
        "token < 0 ? static_cast<const S*>(cache)",
        "token < 100 ? static_cast<const S*>(cache)",
        ("kv relative",),
    ),
    Fault(
        "kv_relative_step",
        "ring that is not gone around",
        "kv_relative_step.cuh",
        "begin + j < capacity ? begin + j : begin + j - capacity",
        "begin + j",
        ("kv relative",),
    ),
    _Fault(
        "bytes of a tile overwritten while they are read",
        "kv_pack.cuh",
        "word;\n      }\n    }\n    __syncthreads();",
        "word;\n      }\n    }",
        ("kv pack",),
    ),
    _Fault(
        "slot that is followed",
        "kv_rows.cuh",
        "slot >= 0 && slot < cache_rows ? slot : -1;",
        "slot;",
        ("AddressSanitizer", "lora_kernels::cuda::"),
        sanitized=True,
    ),
    _Fault(
        "position beyond V",
        "kv_blocked.cuh",
        "step < p_.value_steps && channel",
        "step < p_.value_steps + 1 && channel",
        ("heap-buffer-overflow", "lora_kernels::cuda::KvBlocked<"),
        sanitized=True,
    ),
    Fault(
        "early_start",
        "lengths read before the wait",
        "kv_blocked.cuh",
        "  wait_for_kernel_before();\n  block.run();",
        "  block.run();\n  wait_for_kernel_before();",
        ("early start",),
    ),
]
