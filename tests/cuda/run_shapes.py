"""Run the emulated library named by LORA_KERNELS_EMULATED on odd shapes; print what is wrong.

A program of its own, since AddressSanitizer has to be loaded before the interpreter. With
--serve it runs what its standard input asks for, line by line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import test_emulated_early_start as early  # noqa: E402
import test_emulated_int8_lora_linear as int8  # noqa: E402
import test_emulated_kv_attention_step as kv  # noqa: E402
import test_emulated_kv_relative_step as relative  # noqa: E402
import test_emulated_wgmma as wgmma  # noqa: E402
import torch  # noqa: E402
from emulated import Emulated, EmulationError  # noqa: E402
from emulated_int8 import EmulatedInt8  # noqa: E402
from test_emulated_lora_linear import (  # noqa: E402
    ORDERS,
    base,
    check_backward,
    check_forward,
    possible,
)

Checks = Iterator[tuple[str, Callable[[], object]]]

PLANS = [
    ("two_steps", True, 1),
    ("in_tile", False, 1),
    ("few_rows", False, 2),
    ("few_rows", True, 1),
]
# In a library for another architecture than sm_90 the kernels by wgmma are empty.
OF_SM_75 = "LORA_KERNELS_EMULATED_WITHOUT_WGMMA" in os.environ
if not OF_SM_75:
    PLANS += [("two_steps", 128, 1), ("few_rows", True, 4)]


def same_bits() -> None:
    """Uneven sizes, several steps of depth; in every order of threads the same bits."""
    x, weight, bias, _ = base(30, 200, 70, torch.float16)
    for path, large, splits in PLANS:
        seen = [
            Emulated(*order, path=path, large=large, splits=splits).forward(x, weight, bias)
            for order in ORDERS
        ]
        if not all(torch.equal(y, seen[0]) for y in seen):
            raise AssertionError(f"{path}: the order of threads changes the result")


def lora_linear(dtype: torch.dtype, order: tuple) -> Checks:
    for path, large, splits in PLANS:
        # Two tiles by wgmma share their boxes; of others there are more than one along both sides.
        rows = 9 if path == "few_rows" else 140 if large > 1 else 70
        shape = (rows, 101 if path == "few_rows" else 136, 67)
        for mode in ("peft", "bank", "dropout"):
            if large > 1:  # more steps than it has places for them; by TMA, or not
                shape = (rows, 520 if mode == "peft" else 517, 67)
            if not possible(path, mode, shape[0], large):
                continue
            if large > 1 and dtype == torch.float32:
                continue
            t_blocks = 2 if large > 1 and mode != "dropout" else 0
            emulated = Emulated(*order, path=path, large=large, splits=splits, t_blocks=t_blocks)
            name = f"{path} {'wgmma ' if large > 1 else ''}splits={splits} {mode}"
            yield name, partial(check_forward, emulated, shape, dtype, mode, "silu")
    emulated = Emulated(*order, path="two_steps", splits=2)
    for mode in ("dropout", "bank"):
        yield f"gradients {mode}", partial(check_backward, emulated, (70, 40, 67), dtype, mode)
    for keeps_t in (False, True):
        emulated = Emulated(*order, path="two_steps", splits=2, keeps_t=keeps_t, dy_once=True)
        check = partial(check_backward, emulated, (150, 40, 135), dtype, "dropout", 19)
        yield f"gradients keeps_t={keeps_t}", check
    if not OF_SM_75 and dtype != torch.float32:
        # By TMA, in more steps than there are places for them, or by copies.
        for mode, k, n in [("dropout", 136, 456), ("bank", 71, 67), ("dropout", 71, 67)]:
            emulated = Emulated(*order, path="two_steps", large=128)
            check = partial(check_backward, emulated, (140, k, n), dtype, mode)
            yield f"gradients by wgmma {mode}", check


def int8_lora_linear(dtype: torch.dtype, order: tuple) -> Checks:
    for path, large, splits, most in int8.PLANS:
        clusters = splits > 1 and path != "few_rows"
        if (OF_SM_75 and (large > 1 or clusters)) or (clusters and splits == 2):  # eight do
            continue
        # Large tiles reach beyond a weight of one block, small ones do not; by wgmma more steps
        # than there are places for them, and of blocks that stay four tiles.
        if large > 128 and dtype == torch.float32:
            continue
        rows, k = (140, 1016) if large == 128 else (330, 760) if large else (min(most, 70), 136)
        shape = (rows, k, 300 if large > 128 else 40 if large else 70)
        for mode in ("peft", "bank"):
            emulated = EmulatedInt8(*order, path=path, large=large, splits=splits)
            name = f"int8 {path} {'wgmma ' if large > 1 else ''}splits={splits} {mode}"
            yield name, partial(int8.check, emulated, shape, dtype, mode, "silu")


def kv_attention_step(dtype: torch.dtype, order: tuple) -> Checks:
    for wishes in ({}, {"split_positions": 128, "apart": True}):
        yield f"kv steps {wishes}", partial(kv.check_steps, dtype, order, **wishes)
        yield f"kv blocked {wishes}", partial(kv.check_blocked, dtype, order, **wishes)
    if not OF_SM_75:
        yield "kv clusters", partial(kv.check_clusters, dtype, order)
    yield "kv pack", partial(kv.check_pack, dtype, order)


def kv_relative_step(dtype: torch.dtype, order: tuple) -> Checks:
    for chunks in (0, 1):
        check = partial(relative.check_steps, dtype, order, chunks=chunks)
        yield f"kv relative chunks={chunks}", check


def early_start(dtype: torch.dtype, order: tuple) -> Checks:
    if dtype == torch.float16 and not OF_SM_75:
        for plan in early.PLANS:
            yield f"early start {plan}", partial(early.check_layer, plan, order)


OPERATORS: dict[str, Callable[[torch.dtype, tuple], Checks]] = {
    "lora_linear": lora_linear,
    "int8_lora_linear": int8_lora_linear,
    "kv_attention_step": kv_attention_step,
    "kv_relative_step": kv_relative_step,
    "early_start": early_start,
}


def once(operators: list[str], dtype: torch.dtype) -> Checks:
    """What every order is tried in anyway, or none matters to."""
    if "lora_linear" in operators:
        yield "same bits", same_bits
        if not OF_SM_75:  # one of two tiles that share boxes has more steps of a branch
            check = wgmma.test_ranks_beyond_a_step_and_adapters_that_share_a_tile
            yield "gradients by wgmma dropout, of a bank", partial(check, 0.3)
    if "int8_lora_linear" in operators:
        yield "int8 choice", partial(int8.check_topk, "few_rows", dtype)
        yield "int8 unpack", int8.test_unpack
    if "kv_relative_step" in operators:
        yield "kv relative: short", relative.test_what_is_beyond_a_short_chunk_is_ignored
        indices = relative.test_bad_indices_make_their_row_nan_and_write_nothing
        yield "kv relative: indices", indices
    if "kv_attention_step" in operators:
        yield "kv: new tokens", partial(kv.test_new_tokens_of_other_rows_are_seen, dtype)
        check = partial(kv.test_what_a_query_does_not_see_stays_away, dtype)
        yield "kv: what a query does not see", check
        cluster = 0 if OF_SM_75 else 2
        check = partial(kv.test_bad_indices_make_their_row_nan_and_write_nothing, 0, cluster, dtype)
        yield "kv: indices", check


def main(options: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["float16", "bfloat16", "float32"]
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--orders", type=int, default=3, help="of threads: so many of them")
    parser.add_argument("--first", action="store_true", help="stop at the first that is wrong")
    arguments = parser.parse_args(options)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtypes = [getattr(torch, name) for name in arguments.dtype]

    def checks() -> Checks:
        for dtype in dtypes:
            for order in ORDERS[: arguments.orders]:
                for operator in arguments.operator:
                    for name, check in OPERATORS[operator](dtype, order):
                        yield f"{name} {order}", check
        yield from once(arguments.operator, dtypes[0])

    wrong = 0
    for name, check in checks():
        try:
            check()
        except (AssertionError, EmulationError) as error:
            print(f"WRONG: {name}: {error}")
            wrong += 1
            if arguments.first:
                break
    conflicts = Emulated().lib.emulated_bank_conflicts()
    if conflicts:
        print(f"WRONG: {conflicts} bank conflicts")
        wrong += 1
    print("wrong" if wrong else "all right")
    return min(wrong, 1)


def serve() -> None:
    """A line in, of a library, a file for what is printed, and options; its status out.

    Each has a process of its own, which has everything imported.
    """
    for line in sys.stdin:
        library, output, *options = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(300)  # a kernel that never ends takes no other's answer
            try:
                with open(output, "w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.environ["LORA_KERNELS_EMULATED"] = library
                status = main(options)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else sys.exit(main(sys.argv[1:]))
