"""What the sources of the CUDA kernels and of their launches must not contain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SOURCES = sorted(
    path
    for folder in (CUDA, CUDA / "primitives")
    for path in folder.iterdir()
    if path.suffix in (".cu", ".cuh", ".h")
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# Memory made or freed, waiting for the device, and copies, which may wait for it.
FORBIDDEN = re.compile(
    r"\b(?:cuda(?:Malloc|Free|HostAlloc|HostRegister|Memcpy|Memset)\w*|cuMem\w+|\w*Synchronize"
    r"|std::vector|std::make_(?:unique|shared)|std::(?:map|unordered_map|deque|function)"
    r"|(?:m|c|re)alloc(?=\s*\()|new(?=\s+[\w:(]))\b"
)


def offences(text: str) -> list[str]:
    return FORBIDDEN.findall(COMMENT.sub("", text))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_launch_neither_allocates_nor_waits(path: Path) -> None:
    """So `run` is captured by a CUDA graph at its first call as at any other."""
    assert offences(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "cudaMallocAsync(&p, n, s);",
        "cudaFree(p);",
        "cudaStreamSynchronize(stream);",
        "cuCtxSynchronize();",
        "cudaMemcpyAsync(a, b, n, kind, s);",
        "auto* p = new float[3];",
        "auto* p = new (place) T();",
        "std::vector<int> parts;",
        "void* p = malloc(3);",
    ],
)
def test_each_of_them_is_found(text: str) -> None:
    assert offences(f"int a;  // comment\n{text}") and not offences(f"// {text}\n/* {text} */")


def test_all_sources_are_read() -> None:
    names = {path.name for path in SOURCES}
    assert {"launch.h", "lora_linear.cu", "kv_attend.cuh", "gemm_wgmma.cuh"} <= names
