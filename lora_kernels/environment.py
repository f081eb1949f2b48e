"""What was built, what can run here and why: ``python -m lora_kernels.environment``."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util
from typing import Any

import torch

from . import implementations
from .ops._library import library_path

_PACKAGES = ("lora-kernels", "torch", "transformers", "peft", "safetensors", "numpy")


def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Installed versions by distribution name; "not installed" where there is none."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_name() -> str:
    """The processor's own name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def facts() -> dict[str, Any]:
    """The same as :func:`report`, as data: what benchmarks write at the head of their results.

    Without this machine's paths, which say nothing to others.
    """
    build, rows = implementations.describe()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": list(build.instruction_sets),
        "compiler": build.compiler,
        "build_type": build.build_type,
        "cuda_kernels": not build.without_cuda,
        "cuda_reason": build.without_cuda,
        "torch_cuda": torch.version.cuda or "",
        "forced": torch.ops.lora_kernels.forced_implementation(),
        "versions": versions(),
        "implementations": [vars(row) for row in rows],
    }


def report() -> str:
    """What was built; every implementation, chosen or rejected and why; versions; threads."""
    known = facts()
    lines = [
        f"cpu: {known['cpu']}, {known['cores']} cores, torch uses {known['threads']} threads",
        f"instruction sets: {' '.join(known['instruction_sets']) or 'none of those looked for'}",
        f"library: {library_path()}",
        f"built with: {known['compiler']}, {known['build_type']}; "
        + ("CUDA kernels" if known["cuda_kernels"] else f"no CUDA kernels: {known['cuda_reason']}"),
        "versions: "
        + ", ".join(f"{name} {text}" for name, text in known["versions"].items())
        + f", Python {known['python']}",
    ]
    if known["forced"]:
        lines.append(f"forced implementation: {known['forced']} (LORA_KERNELS_FORCE)")
    lines += ["", f"{'operator':20} {'implementation':15} state"]
    for row in known["implementations"]:
        state = "selected" if row["selected"] else "available, not the first choice"
        if row["available"] and not row["selected"] and known["forced"]:
            state = "available, another one is forced"
        if not row["available"]:
            state = f"rejected: {row['reason']}"
        lines.append(f"{row['op']:20} {row['name']:15} {state}")
    missing = [name for name in ("transformers", "peft") if util.find_spec(name) is None]
    if missing:
        lines += ["", f"not installed: {', '.join(missing)}; pip install 'lora-kernels[speech]'"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
