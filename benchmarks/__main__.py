"""``python -m benchmarks``: run the benchmarks, print the table, keep the JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest


def table(results: dict) -> str:
    """One line per benchmark: our percentiles, the roofline, and the ratio to every peer."""
    info = results["machine_info"]
    limits = info["limits"]
    lines = [
        f"{info['cpu']}, {info['threads']} threads, torch {info['versions']['torch']}, "
        f"read {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, fp32 "
        f"{limits['float32_per_second'] / 1e9:.0f} and bf16 "
        f"{limits['bfloat16_per_second'] / 1e9:.0f} Gop/s",
        f"{'benchmark':72} {'p20':>8} {'p50':>8} {'p80':>8} us  roofline  ours / peer (median)",
    ]
    for entry in results["benchmarks"]:
        extra = entry["extra_info"]
        ours = extra["ours"]
        ratios = "  ".join(f"{name} {value:.2f}" for name, value in extra["ratio_to_peer"].items())
        name = f"{extra['op']} {entry['name'].removeprefix('test_')}"
        lines.append(
            f"{name:72} {ours['p20_us']:8.1f} {ours['p50_us']:8.1f} {ours['p80_us']:8.1f}     "
            f"{100 * extra['roofline_fraction']:6.0f} %  {ratios}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5, help="time for one comparison")
    parser.add_argument("-k", default="", help="only benchmarks whose name matches (as in pytest)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"operators-{arguments.threads}-threads.json"
    unfinished = path.with_suffix(".part")
    begin = time.perf_counter()
    code = pytest.main(
        [
            str(Path(__file__).parent),
            "-o",
            "python_files=bench_*.py",
            "-q",
            "-p",
            "no:cacheprovider",
            "--benchmark-quiet",
            f"--benchmark-json={unfinished}",
            f"--threads={arguments.threads}",
            f"--seconds={arguments.seconds}",
            *(["-k", arguments.k] if arguments.k else []),
        ]
    )
    if code != 0 or not unfinished.is_file():
        unfinished.unlink(missing_ok=True)
        return int(code) or 1
    results = json.loads(unfinished.read_text())
    results["machine_info"].pop("node", None)  # this machine's name says nothing to others
    for entry in results["benchmarks"]:
        entry["stats"].pop("data", None)  # percentiles are kept, single rounds are not
    path.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.unlink()
    print(table(results))
    print(f"{path} written after {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
