"""Runs a TensorRT engine on arrays of a file, in a process without torch.

python examples/run_engine.py model.engine inputs.npz outputs.npz

inputs.npz has an array for each input, by name (numpy.savez); outputs.npz gets those of the
outputs. Needs TensorRT (--rtx: TensorRT for RTX, where that built the engine ahead of time), and
cuda-python (the package cuda-bindings) or PyCUDA.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import numpy as np


def import_runner() -> Any:
    """``lora_kernels.export.tensorrt_runner`` without the package's face, which imports torch."""
    spec = find_spec("lora_kernels")
    if spec is None:
        sys.exit("lora_kernels is not installed in this environment: pip install .")
    sys.modules.setdefault("lora_kernels", module_from_spec(spec))  # never executed
    from lora_kernels.export import tensorrt_runner

    return tensorrt_runner


def main() -> None:
    """Read the command line, run once, write the outputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("inputs", type=Path, help=".npz, an array for each input")
    parser.add_argument("outputs", type=Path, help=".npz to write")
    parser.add_argument("--plugins", type=Path, help="the plugin library (default: the package's)")
    parser.add_argument(
        "--rtx", action="store_true", help="built ahead of time, by TensorRT for RTX"
    )
    arguments = parser.parse_args()
    module = import_runner()
    from lora_kernels.errors import LoraKernelsError

    try:
        runner = module.EngineRunner(
            arguments.engine, plugin_library=arguments.plugins, rtx=arguments.rtx
        )
        with np.load(arguments.inputs) as arrays:
            results = runner(dict(arrays))
    except (LoraKernelsError, OSError) as error:
        sys.exit(f"error: {error}")
    partial = arguments.outputs.with_suffix(".partial.npz")
    try:
        np.savez(partial, **results)
        partial.replace(arguments.outputs)
    finally:
        partial.unlink(missing_ok=True)
    for name, array in results.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")


if __name__ == "__main__":
    main()
