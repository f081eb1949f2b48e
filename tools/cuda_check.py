"""Compile every CUDA kernel for every architecture, without a GPU, and look at what came out.

``make cuda-check`` fails if a kernel spills registers or has a stack beyond what
``csrc/cuda/resources.json`` records, if it takes more registers than recorded there or more shared
memory than the architecture has, or if its machine code lacks the instructions that it was written
for: tensor-core products (HMMA, IMMA, HGMMA, IGMMA), ldmatrix (LDSM), asynchronous copies (LDGSTS,
UTMALDG). So it does if the compiler puts wgmma's products one after another, or has a fence of the
whole device in a kernel (MEMBAR.GPU: blocks hand each other nothing that wants one). ``--record``
writes that file anew, for the change to be reviewed with the kernel's.

It also writes ``compiled.json``: a hash of each compiled source, behind its preprocessor, with the
tools' versions, the options and the rules, and one of the record. With ``--changed`` what has the
hash noted there is not compiled once more, since nothing else could come out, but for fp16 on
sm_90, which shows that the record is true.

Needs nvcc, g++ and nvdisasm (of the toolkit, or ``pip install nvidia-cuda-nvdisasm``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cuda_machine_code import (
    MOST_SHARED,
    OF_HOPPER,
    Kernel,
    faults,
    instructions,
    parse,
    serialized,
    short,
    too_soon,
)

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RECORD = CSRC / "cuda" / "resources.json"
COMPILED = CSRC / "cuda" / "compiled.json"
RULES = Path(__file__).with_name("cuda_machine_code.py")
ARCHITECTURES = tuple(MOST_SHARED)
# sm_75 multiplies fp16 alone on its tensor cores, and INT8.
TYPES = {"f16": ARCHITECTURES, "bf16": ARCHITECTURES[1:], "f32": ARCHITECTURES[1:]}
OPERATORS = (
    *("lora_linear", "int8_lora_linear"),
    *("kv_attention_step", "kv_pack", "kv_relative_step"),
)

ALWAYS = ("f16", 90)  # compiled with --changed too
# The sizes of dynamic shared memory are constants of the kernels' headers.
SHARED_SIZES = ROOT / "tools" / "cuda_shared_sizes.cpp"


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


@dataclass(frozen=True)
class Unit:
    """One storage type of an operator for one architecture."""

    operator: str
    kind: str
    arch: int

    def __str__(self) -> str:
        return f"{self.operator} {self.kind} sm_{self.arch}"

    @property
    def source(self) -> Path:
        return CSRC / "cuda" / f"{self.operator}_{self.kind}.cu"

    @property
    def options(self) -> list[str]:
        feature = "a" if self.arch == 90 else ""  # wgmma is of sm_90a alone
        language = ["-std=c++17", "-O3", f"-arch=sm_{self.arch}{feature}"]
        return [*language, "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]

    @property
    def preprocessed(self) -> list[str]:
        """The options of the preprocessor alone, which then lacks what "a" defines."""
        defined = ("FEAT_SM90_ALL", f"SPECIFIC__={self.arch}0", f"FAMILY_SPECIFIC__={self.arch}0")
        features = [f"-D__CUDA_ARCH_{name}" for name in defined] if self.arch == 90 else []
        return [*self.options[:3], *features, "-E"]


class Compiler:
    """nvcc and nvdisasm, and a folder for what they make."""

    def __init__(self, nvcc: str, nvdisasm: str, folder: Path) -> None:
        self._nvcc = [nvcc, f"-I{CSRC / 'include'}", f"-I{CSRC}"]
        self._nvdisasm, self._folder = nvdisasm, folder
        self._tools = RULES.read_bytes()
        for program in (nvcc, nvdisasm):
            said = subprocess.run([program, "--version"], capture_output=True, check=True)
            self._tools += said.stdout
        for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
            self._tools += os.environ.get(name, "").encode()

    def hash_of(self, unit: Unit) -> str:
        """Of all that decides what comes out, and of the rules that it was held against."""
        run = subprocess.run(
            [*self._nvcc, *unit.preprocessed, str(unit.source)], capture_output=True, text=True
        )
        if run.returncode:
            sys.exit(f"cuda-check: {unit} does not compile:\n{run.stderr}")
        lines = [line for line in run.stdout.splitlines() if line.strip()]
        found = hashlib.sha256(self._tools + " ".join(unit.options).encode())
        # Lines that begin with "# " say which file is read, by its path.
        found.update("\n".join(line for line in lines if not line.startswith("# ")).encode())
        return found.hexdigest()[:32]

    def compile(self, unit: Unit) -> dict[str, Kernel]:
        """The kernels of a unit by name; ends the program if they are not what was written."""
        cubin = self._folder / f"{unit}.cubin"
        command = [*self._nvcc, *unit.options, "-o", str(cubin), str(unit.source)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"cuda-check: {unit} does not compile:\n{run.stderr}")
        if serialized(run.stderr):
            sys.exit(f"cuda-check: {unit}: wgmma waits for itself:\n{run.stderr}")
        code = subprocess.run(
            [self._nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        if unit.arch >= 90 and too_soon(code):
            sys.exit(
                f"cuda-check: {unit}: {', '.join(too_soon(code))}: "
                "a load or store before wait_for_kernel_before()"
            )
        found = instructions(code)
        kernels = {}
        for symbol, kernel in parse(run.stderr).items():
            seen = found.get(symbol, {})
            kernel.instructions = " ".join(f"{name}:{seen[name]}" for name in sorted(seen))
            kernels[short(symbol)] = kernel
        return kernels


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


def shared_of(name: str, arch: int, sizes: dict[str, int]) -> int:
    """What a kernel takes on an architecture, where it may be empty."""
    return 0 if arch != 90 and name.startswith(OF_HOPPER) else sizes.get(name, 0)


def too_large(recorded: dict[str, dict[str, dict]], sizes: dict[str, int]) -> list[str]:
    """Recorded kernels that take more shared memory than there is: the host says how much."""
    return [
        f"sm_{arch} {name}: {shared_of(name, arch, sizes)} bytes of shared memory, at most {most}"
        for arch, most in MOST_SHARED.items()
        for name in sorted(recorded.get(f"sm_{arch}", {}))
        if shared_of(name, arch, sizes) > most
    ]


def hash_of_record() -> str:
    return hashlib.sha256(RECORD.read_bytes()).hexdigest()[:32] if RECORD.is_file() else ""


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
    parser.add_argument(
        "--changed",
        action="store_true",
        help=f"compile what is not as {COMPILED.name} has it, and fp16 for sm_90",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    if nvcc is None:
        sys.exit("cuda-check: nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    if nvdisasm is None:
        sys.exit("cuda-check: nvdisasm was not found; pip install nvidia-cuda-nvdisasm")
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    compiled = json.loads(COMPILED.read_text()) if COMPILED.is_file() else {}
    if compiled.get(RECORD.name) != hash_of_record():
        compiled = {}  # of another record
    units = [
        Unit(operator, kind, arch)
        for operator in arguments.operator
        for kind in arguments.type
        for arch in arguments.arch
        if arch in TYPES[kind]
    ]
    begin, wrong, count = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        compiler = Compiler(nvcc, nvdisasm, Path(name))
        hashes = dict(zip(units, pool.map(compiler.hash_of, units), strict=True))
        known = {unit for unit in units if compiled.get(str(unit)) == hashes[unit]}
        work = {
            unit: pool.submit(compiler.compile, unit)
            for unit in units
            if not (arguments.changed and unit in known and (unit.kind, unit.arch) != ALWAYS)
        }
        sizes = shared_sizes(Path(name))
        for unit, result in work.items():
            budgets = recorded.setdefault(f"sm_{unit.arch}", {})
            before = len(wrong)
            for kernel_name, kernel in result.result().items():
                kernel.shared = shared_of(kernel_name, unit.arch, sizes)
                if arguments.record:
                    budgets[kernel_name] = asdict(kernel)
                wrong += faults(kernel_name, unit.kind, unit.arch, kernel, budgets.get(kernel_name))
                count += 1
                print(
                    f"sm_{unit.arch:<4} {kernel_name:52} {kernel.registers:4} registers "
                    f"{kernel.shared:6} B shared  stack {kernel.stack}  spills "
                    f"{kernel.spill_stores}/{kernel.spill_loads}  {kernel.instructions}"
                )
            if len(wrong) == before:
                compiled[str(unit)] = hashes[unit]
            else:
                compiled.pop(str(unit), None)
    if arguments.record:
        RECORD.write_text(one_line_each(recorded))
        compiled[RECORD.name] = hash_of_record()
        COMPILED.write_text(json.dumps(compiled, indent=1, sort_keys=True) + "\n")
    if len(work) < len(units):
        wrong += too_large(recorded, sizes)
    for fault in wrong:
        print(f"FAILED: {fault}")
    if len(work) < len(units):
        print(f"{len(units) - len(work)} of {len(units)} sources are as {COMPILED.name} has them")
    elif not arguments.record and len(known) < len(units):
        print(f"{len(units) - len(known)} sources are not as {COMPILED.name} has them: --record")
    seconds = time.perf_counter() - begin
    print(f"cuda-check: {count} kernels, {len(wrong)} faults, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
