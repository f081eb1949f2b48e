"""Modules that are one call of an operator, exported and run: what the tests of exports share."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from lora_kernels import export


class Call(torch.nn.Module):
    """A module that is one call: operands by name, those in ``fixed`` as buffers."""

    def __init__(self, function, names: list[str], fixed: dict, **options) -> None:
        super().__init__()
        self.function, self.names, self.options = function, names, options
        self.fixed = list(fixed)
        for name, value in fixed.items():
            self.register_buffer(f"{name}_", value)
        self.eval()

    def forward(self, *inputs: torch.Tensor):
        operands = dict(zip(self.names, inputs, strict=True))
        operands |= {name: getattr(self, f"{name}_") for name in self.fixed}
        return self.function(**operands, **self.options)


def exported(module: torch.nn.Module, inputs: tuple, folder: Path, **options) -> Path:
    """``model.onnx`` in the folder."""
    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        verbose=False,
        opset_version=18,
        custom_translation_table=export.translations(),
        **options,
    )
    export.finish(program.model)
    program.save(str(folder / "model.onnx"))
    return folder / "model.onnx"


def run(model: Path, inputs: tuple) -> list[torch.Tensor]:
    """The outputs by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feeds = dict(zip(names, (i.numpy() for i in inputs), strict=True))
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


def bank(ranks: list[int], k: int, n: int, groups: int, dtype=torch.float32) -> dict:
    """A ragged bank, and an adapter or none for each group of rows."""
    total = sum(ranks)
    return {
        "lora_a": (torch.randn(total, k) / k**0.5).to(dtype),
        "lora_b": torch.randn(total, n).to(dtype),
        "scales": torch.rand(len(ranks)) + 0.5,
        "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
        "adapter_ids": torch.randint(-1, len(ranks), (groups,), dtype=torch.int32),
    }
