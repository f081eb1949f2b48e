"""The report of what was built and what runs, and forcing an implementation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels import environment, implementations


def test_report_names_every_implementation_and_its_state() -> None:
    text = environment.report()
    for op in (
        "lora_linear",
        "int8_lora_linear",
        "kv_attention_step",
        "kv_pack",
        "kv_relative_step",
    ):
        rows = [line for line in text.splitlines() if line.startswith(op)]
        assert sum("selected" in row for row in rows) == 1
        assert any("generic" in row for row in rows)
    assert f"torch {torch.__version__}" in text
    assert "threads" in text


def test_command_line_and_environment_variable() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "lora_kernels.environment"],
        env=os.environ | {"LORA_KERNELS_FORCE": "generic"},
        capture_output=True,
        text=True,
        check=True,
    )
    selected = [line for line in run.stdout.splitlines() if line.endswith(" selected")]
    assert len(selected) == 5
    assert all("generic" in line for line in selected)


@pytest.mark.parametrize("name", ["avx1024", "avx512_vnni", "_avx2"])
def test_an_unknown_name_in_the_environment_is_an_error(name: str) -> None:
    code = (
        "import torch, lora_kernels as lk; lk.ops.lora_linear(torch.ones(1, 1), torch.ones(1, 1))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LORA_KERNELS_FORCE": name},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "LORA_KERNELS_FORCE" in run.stderr
    assert name in run.stderr


@pytest.mark.skipif(
    "amx_tile" not in Path("/proc/cpuinfo").read_text(), reason="this CPU has no tile registers"
)
def test_tile_registers_that_the_system_refuses_are_a_reason() -> None:
    """Linux refuses them to a process whose alternate signal stack would not hold them."""
    code = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(memory), 0, 8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import torch, lora_kernels as lk
from lora_kernels import implementations, ops
for row in implementations.describe()[1]:
    if row.name == "amx":
        assert not row.available and "refuses this process AMX" in row.reason, row
ops.int8_lora_linear(torch.ones(64, 4), ops.int8_pack(torch.ones(4, 4).char(), torch.ones(4)), 4)
try:
    with lk.force_implementation("amx"):
        ops.lora_linear(torch.ones(1, 1), torch.ones(1, 1))
except lk.LoraKernelsError as error:
    assert "refuses this process AMX" in str(error), error
else:
    raise AssertionError("amx ran")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_force_is_a_context() -> None:
    x = torch.randn(2, 3)
    before = {
        row.name: row.runs for row in implementations.describe()[1] if row.op == "lora_linear"
    }
    with lk.force_implementation("generic"):
        lk.ops.lora_linear(x, torch.randn(4, 3))
    after = {row.name: row.runs for row in implementations.describe()[1] if row.op == "lora_linear"}
    assert after["generic"] == before["generic"] + 1
    assert torch.ops.lora_kernels.forced_implementation() == ""
    with (
        pytest.raises(lk.LoraKernelsError, match=r"name.*avx512.*'sse9'"),
        lk.force_implementation("sse9"),
    ):
        pass
