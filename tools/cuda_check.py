"""Compile every CUDA kernel for every architecture, without a GPU, and look at what came out.

``make cuda-check`` fails if a kernel spills registers or has a stack beyond what
``csrc/cuda/resources.json`` records, if it takes more registers than recorded there or more shared
memory than the architecture has, or if its machine code lacks the instructions that it was written
for: tensor-core products (HMMA, IMMA, HGMMA, IGMMA), ldmatrix (LDSM), asynchronous copies (LDGSTS,
UTMALDG). So it does if the compiler puts wgmma's products one after another, or has a fence of the
whole device in a kernel (MEMBAR.GPU: blocks hand each other nothing that wants one). ``--record``
writes that file anew, for the change to be reviewed with the kernel's.

Needs nvcc, g++ and nvdisasm (of the toolkit, or ``pip install nvidia-cuda-nvdisasm``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RECORD = CSRC / "cuda" / "resources.json"
# Architectures, and the shared memory that a block may have there at most (CUDA programming guide).
MOST_SHARED = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
ARCHITECTURES = tuple(MOST_SHARED)
# sm_75 multiplies fp16 alone on its tensor cores, and INT8.
TYPES = {"f16": ARCHITECTURES, "bf16": ARCHITECTURES[1:], "f32": ARCHITECTURES[1:]}
OPERATORS = (
    *("lora_linear", "int8_lora_linear"),
    *("kv_attention_step", "kv_pack", "kv_relative_step"),
)

# The sizes of dynamic shared memory are constants of the kernels' headers.
SHARED_SIZES = ROOT / "tools" / "cuda_shared_sizes.cpp"
PRODUCTS = ("kForward", "kInTile", "kInputGradient", "kMaskedGradient", "kRowSums")


@dataclass
class Kernel:
    """What ptxas says of a kernel on one architecture, and what its machine code holds."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int = 0
    instructions: str = ""


def tool(name: str) -> str | None:
    """A tool on the path, in the toolkit, or in one of NVIDIA's wheels beside this Python."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(name, path=f"{home}/bin")
    if found:
        return found
    for path in map(Path, sys.path):
        for candidate in path.glob(f"nvidia/**/bin/{name}"):
            candidate.chmod(candidate.stat().st_mode | 0o111)
            return str(candidate)
    return None


def short(symbol: str) -> str:
    """``gemm<__half, LargeShape, kForward>`` of a mangled name."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    text = text.strip().replace("lora_kernels::cuda::", "").removeprefix("void ")
    text = re.sub(r"\(Product\)(\d)", lambda m: PRODUCTS[int(m[1])], text)
    return text.rsplit("(", 1)[0]


def parse(report: str) -> dict[str, Kernel]:
    """The kernels in the report of ``-Xptxas -v``."""
    kernels = {}
    pattern = re.compile(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for symbol, stack, stores, loads, registers in pattern.findall(report):
        kernels[symbol] = Kernel(int(registers), int(stack), int(stores), int(loads))
    return kernels


# Instructions that tell what a kernel does, in its machine code.
INTERESTING = re.compile(
    r"\b(HGMMA|IGMMA|IMMA|QMMA|HMMA)[\w.]*|\b(LDSM|LDGSTS|LDL|STL|UTMALDG|MEMBAR)\b[\w.]*"
)


def named(instruction: str) -> str:
    """With its modifiers where they make another instruction of it."""
    first, *modifiers = instruction.split(".")
    if "MMA" in first:
        return instruction
    kept = [m for m in modifiers if m == "MULTICAST" or (first == "MEMBAR" and m in ("GPU", "SYS"))]
    return ".".join([first, *kept])


def instructions(code: str) -> dict[str, dict[str, int]]:
    """How often each interesting instruction stands in each kernel's code."""
    counts: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in code.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\S+?),", line)
        if section:
            current = counts.setdefault(section[1], {})
        found = INTERESTING.search(line)
        if found:
            name = named(found[0])
            if name != "MEMBAR":  # of the block alone
                current[name] = current.get(name, 0) + 1
    return counts


# Kernels that may start before the kernel before them has finished, whatever that writes.
START_EARLY = ("int8_few_rows<", "int8_together<", "int8_rows<", "int8_combine<", "top_", "kv_a")
START_EARLY += ("kv_blocked<", "kv_combine<", "kv_weights<")
# And those that read what a kernel before them in the same call has made. (Products of y and dx
# load before they wait, and only what no kernel of the call makes.)
START_EARLY += ("convert_factor<", "down<", "dy_once<", "join_parts<", "add_parts<", "column_sums<")


def starts_early(name: str) -> bool:
    return name.startswith(START_EARLY) or (name.startswith("gemm<") and "kRowSums" in name)


def too_soon(code: str) -> list[str]:
    """The kernels of those that load or store, by the order of their code, before they wait.

    A compiler may move a load of the read-only path over the wait, and nothing but this shows it.
    """
    found, name, waited = [], "", False
    for line in code.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\S+?),", line)
        if section:
            name, waited = short(section[1]), False
        waited = waited or "ACQBULK" in line
        if not waited and starts_early(name) and re.search(r"\b(LDG|STG|LDGSTS)\b", line):
            found.append(name)
    return sorted(set(found))


def compile_one(
    operator: str, kind: str, arch: int, nvcc: str, nvdisasm: str, folder: Path
) -> dict[str, Kernel]:
    """One storage type of an operator for one architecture."""
    cubin = folder / f"{operator}.{kind}.{arch}.cubin"
    command = [nvcc, f"-I{CSRC / 'include'}", f"-I{CSRC}", "-std=c++17", "-O3", "-cubin"]
    feature = "a" if arch == 90 else ""  # wgmma is of sm_90a alone
    command += [
        f"-arch=sm_{arch}{feature}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        "-o",
        str(cubin),
    ]
    run = subprocess.run(
        [*command, str(CSRC / "cuda" / f"{operator}_{kind}.cu")], capture_output=True, text=True
    )
    if run.returncode:
        sys.exit(f"cuda-check: {operator} of {kind} does not compile for sm_{arch}:\n{run.stderr}")
    if serialized(run.stderr):
        sys.exit(f"cuda-check: {operator} of {kind}: wgmma waits for itself:\n{run.stderr}")
    code = subprocess.run(
        [nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    if arch >= 90 and too_soon(code):
        sys.exit(
            f"cuda-check: {operator} of {kind} for sm_{arch}: {', '.join(too_soon(code))}: "
            "a load or store before wait_for_kernel_before()"
        )
    found = instructions(code)
    kernels = {}
    for symbol, kernel in parse(run.stderr).items():
        seen = found.get(symbol, {})
        kernel.instructions = " ".join(f"{name}:{seen[name]}" for name in sorted(seen))
        kernels[short(symbol)] = kernel
    return kernels


def serialized(said: str) -> bool:
    """Whether ptxas puts products of wgmma one after another, or a fence that the source lacks."""
    return "injected" in said or ("wgmma" in said and "serialized" in said)


GEMM_LIKE = (
    *("gemm<", "down<", "down_beside<", "few_rows<", "dy_once<"),
    *("int8_gemm<", "int8_few", "int8_together<", "int8_rows<", "kv_attend<", "kv_relative<"),
)

OF_HOPPER = ("gemm_wgmma<", "int8_wgmma<", "down_beside<")  # empty elsewhere


def expected(name: str, kind: str, arch: int) -> list[str]:
    """The instructions that a kernel must have."""
    if name.startswith("kv_blocked<"):
        return ["IMMA.8816" if arch < 80 else "IMMA.16832"]
    if name.startswith(OF_HOPPER) and arch != 90:
        return []
    if name.startswith("gemm_wgmma<"):
        return ["HGMMA.64x", "LDGSTS", "UTMALDG:", "UTMALDG.MULTICAST"]
    if kind == "f32":
        wanted = ["HMMA.1688.F32.TF32"]
    else:
        wanted = ["HMMA.1688.F32" if arch < 80 else "HMMA.16816.F32"]
    if name.startswith("int8_wgmma<"):
        return ["IGMMA.64x128x32", "UTMALDG:", "UTMALDG.MULTICAST", "LDSM", "LDGSTS", *wanted]
    if not name.startswith(GEMM_LIKE):
        return []
    if name.startswith(("int8_gemm<", "int8_few", "int8_together<")):
        wanted = ["IMMA.8816" if arch < 80 else "IMMA.16832", *(wanted if "gemm" in name else [])]
    if "gemm<" in name or name.startswith("dy_once<"):
        wanted += ["LDSM"] if not (kind == "f32" and "kRowSums" in name) else []
        wanted += ["LDGSTS"] if arch >= 80 else []
    return wanted


def faults(name: str, kind: str, arch: int, kernel: Kernel, budget: dict | None) -> list[str]:
    """What is wrong with a kernel: all of it."""
    where = f"sm_{arch} {name}"
    if budget is None:
        return [f"{where}: not in {RECORD.name}; run `make cuda-check RECORD=--record`"]
    found = []
    for field in ("stack", "spill_stores", "spill_loads", "registers"):
        now, allowed = getattr(kernel, field), budget[field]
        if now > allowed:
            found.append(f"{where}: {field} {now}, recorded {allowed}")
    if kernel.shared > MOST_SHARED[arch]:
        found.append(
            f"{where}: {kernel.shared} bytes of shared memory, at most {MOST_SHARED[arch]}"
        )
    for wanted in expected(name, kind, arch):
        if not any(part.startswith(wanted) for part in kernel.instructions.split()):
            found.append(f"{where}: no {wanted} in its machine code ({kernel.instructions})")
    if "MEMBAR" in kernel.instructions:
        found.append(f"{where}: a fence of the whole device ({kernel.instructions})")
    return found


def shared_sizes(folder: Path) -> dict[str, int]:
    """Dynamic shared memory by kernel, in bytes."""
    program = folder / "sizes"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    command = ["g++", "-std=c++17", "-O0", "-w", "-DLORA_KERNELS_EMULATION", f"-I{CSRC}"]
    command += [f"-I{CSRC / 'include'}", f"-I{home}/include", str(SHARED_SIZES), "-o", str(program)]
    emulation = CSRC / "cuda" / "emulation"
    command += [str(part) for part in emulation.glob("*.cpp")]
    subprocess.run(command, check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in (line.split("\t") for line in lines.splitlines())}


def one_line_each(recorded: dict[str, dict[str, dict]]) -> str:
    """The record as JSON, a line for each kernel: changes to it are read by people."""
    parts = []
    for arch in sorted(recorded, key=lambda name: int(name.removeprefix("sm_"))):
        lines = [
            f"  {json.dumps(name)}: {json.dumps(kernel)}"
            for name, kernel in sorted(recorded[arch].items())
        ]
        parts.append(f" {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--type", nargs="*", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--operator", nargs="*", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--record", action="store_true", help="write what is found as the budget")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    if nvcc is None:
        sys.exit("cuda-check: nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    if nvdisasm is None:
        sys.exit("cuda-check: nvdisasm was not found; pip install nvidia-cuda-nvdisasm")
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    begin, wrong, count = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = Path(name)
        work = {
            (operator, kind, arch): pool.submit(
                compile_one, operator, kind, arch, nvcc, nvdisasm, folder
            )
            for operator in arguments.operator
            for kind in arguments.type
            for arch in arguments.arch
            if arch in TYPES[kind]
        }
        sizes = shared_sizes(folder)
        for (_, kind, arch), result in work.items():
            kernels = result.result()
            budgets = recorded.setdefault(f"sm_{arch}", {})
            for kernel_name, kernel in kernels.items():
                kernel.shared = sizes.get(kernel_name, 0)
                if arch != 90 and kernel_name.startswith(OF_HOPPER):
                    kernel.shared = 0
                if arguments.record:
                    budgets[kernel_name] = asdict(kernel)
                wrong += faults(kernel_name, kind, arch, kernel, budgets.get(kernel_name))
                count += 1
                print(
                    f"sm_{arch:<4} {kernel_name:52} {kernel.registers:4} registers "
                    f"{kernel.shared:6} B shared  stack {kernel.stack}  spills "
                    f"{kernel.spill_stores}/{kernel.spill_loads}  {kernel.instructions}"
                )
    if arguments.record:
        RECORD.write_text(one_line_each(recorded))
    for fault in wrong:
        print(f"FAILED: {fault}")
    seconds = time.perf_counter() - begin
    print(f"cuda-check: {count} kernels, {len(wrong)} faults, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
