"""torch.compile's work ahead of the measurement, beside the tests: its caches on disk keep it.

``python -m benchmarks.gpu_suite.compile_ahead --out FILE``: each contestant that is compiled, once,
those first that an aim names; a line of FILE says what it took. The suite ends it when it begins to
measure, whose compilations then find most of theirs done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .case import COMPILE_S, Case
from .machine import main_dtype
from .measure import all_cases


def compile_all(cases: list[Case], device: str) -> Iterator[dict[str, Any]]:
    """What each took in seconds; one that fails is the measurement's to report."""
    for asked_for in (True, False):
        for case in cases:
            named = {aim.against for aim in case.aims}
            if asked_for and not case.compile_s(COMPILE_S):
                continue  # its operands need not be made
            with torch.set_grad_enabled(case.grad):
                for name, contestant in case.contestants(case, device).items():
                    if not contestant.compiled or contestant.absent:
                        continue
                    if (name in named) != asked_for:
                        continue
                    begin = time.perf_counter()
                    try:
                        contestant.prepare()()
                    except Exception as error:  # the measurement meets it again, and keeps it
                        print(f"{case.name}: {name}: {error}", file=sys.stderr)
                        continue
                    yield {"compiled": name, "seconds": time.perf_counter() - begin}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite.compile_ahead")
    parser.add_argument("--out", type=Path, required=True, help="JSON, a line for each contestant")
    with parser.parse_args().out.open("w") as out:
        for line in compile_all(all_cases(main_dtype()), "cuda"):
            out.write(json.dumps(line) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
