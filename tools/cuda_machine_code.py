"""What compilers say of CUDA kernels and what their machine code holds: cuda_check.py's rules."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

PRODUCTS = ("kForward", "kInTile", "kInputGradient", "kMaskedGradient", "kRowSums")

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


@dataclass
class Kernel:
    """What ptxas says of a kernel on one architecture, and what its machine code holds."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int = 0
    instructions: str = ""


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


def serialized(said: str) -> bool:
    """Whether ptxas puts products of wgmma one after another, or a fence that the source lacks."""
    return "injected" in said or ("wgmma" in said and "serialized" in said)


GEMM_LIKE = (
    *("gemm<", "down<", "down_beside<", "few_rows<", "dy_once<"),
    *("int8_gemm<", "int8_few", "int8_together<", "int8_rows<", "kv_attend<", "kv_relative<"),
)

OF_HOPPER = ("gemm_wgmma<", "int8_wgmma<", "int8_persistent<", "down_beside<")  # empty elsewhere


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
    if name.startswith(("int8_wgmma<", "int8_persistent<")):
        columns = 128 if "wgmma" in name else 160 if ", 320>" in name else 256
        return [
            f"IGMMA.64x{columns}x32",
            "UTMALDG:",
            "UTMALDG.MULTICAST",
            "LDSM",
            "LDGSTS",
            *wanted,
        ]
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
        return [f"{where}: not in resources.json; run `make cuda-check OPTIONS=--record`"]
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
