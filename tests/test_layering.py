"""Which way things point: the kernels' package stands alone, and nothing points down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lora_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"transformers", "peft", "accelerate", "datasets"}
# Loaded only once a transformers model takes its first cached step.
LAZY = {"lora_kernels.integrations.transformers_cache"}

# Folder or module of lora_kernels to what it may import of lora_kernels (besides itself).
ALLOWED = {
    "errors": set(),
    "report": set(),
    "benchmarking": set(),
    "reference": {"errors"},
    "ops": {"errors"},
    "adapters": {"errors"},
    "nn": {"errors", "adapters", "ops"},
    "integrations": {"errors", "adapters", "ops", "nn"},
    "selection": {"errors", "adapters"},
    "quantization": {"errors", "integrations", "nn", "report", "selection"},
    "live": {"errors", "adapters", "nn", "integrations"},
    "merge": {"errors", "live", "nn"},
    "implementations": {"errors", "ops"},
    "environment": {"implementations", "ops"},
    "swap": {"errors", "integrations", "live", "nn", "report", "selection"},
}

SPEECH = PACKAGE.parent / "python" / "lora_speech"
FACES = {SPEECH / "__init__.py", SPEECH / "__main__.py"}
SPEECH_FILES = sorted(path for path in SPEECH.rglob("*.py") if path not in FACES)
# Each folder or module of lora_speech may use those before it.
SPEECH_ORDER = (
    "errors", "devices", "files", "page", "charts", "progress", "synthetic", "models", "data",
    "decoding", "transcription", "formats", "evaluation", "training", "pretraining", "export",
    "bench", "demo", "cli",
)  # fmt: skip


def _module_name(path: Path) -> str:
    root = SPEECH.parent if path.is_relative_to(SPEECH) else PACKAGE.parent
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, top_level: bool) -> set[str]:
    """Absolute names of what a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = _module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=_module_name)
def test_kernels_never_import_what_is_above_them(path):
    roots = {name.split(".")[0] for name in _imports(path, top_level=False)}
    assert "lora_speech" not in roots
    if _module_name(path) not in LAZY:
        at_import = _imports(path, top_level=True)
        assert not {name.split(".")[0] for name in at_import} & HEAVY
        assert not any(name.startswith(tuple(LAZY)) for name in at_import)


@pytest.mark.parametrize("path", FILES, ids=_module_name)
def test_parts_of_the_package_point_one_way(path):
    part = _module_name(path).split(".")[1] if path.parent != PACKAGE else path.stem
    if part not in ALLOWED:
        pytest.skip("the package's face may import every part")
    used = {
        name.split(".")[1]
        for name in _imports(path, top_level=True)
        if name.startswith("lora_kernels.")
    }
    assert used - {part} <= ALLOWED[part]


@pytest.mark.parametrize("path", SPEECH_FILES, ids=_module_name)
def test_parts_of_the_speech_layer_point_one_way(path):
    part = _module_name(path).split(".")[1]
    names = _imports(path, top_level=False)
    used = {name.split(".")[1] for name in names if name.startswith("lora_speech.")}
    assert used - {part} <= set(SPEECH_ORDER[: SPEECH_ORDER.index(part)])
    assert "lora_speech" not in names, "the package's face uses everything"


@pytest.mark.parametrize("path", FILES, ids=_module_name)
def test_nothing_computes_with_the_reference_that_judges_it(path):
    if path.parent != PACKAGE / "reference" and path != PACKAGE / "__init__.py":
        names = _imports(path, top_level=False)
        assert not any(name.startswith("lora_kernels.reference") for name in names)


def test_importing_the_package_imports_no_other_library():
    code = "import sys, lora_kernels; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = set(result.stdout.split())
    assert not loaded & (HEAVY | {"lora_speech"})


def test_importing_never_initialises_a_gpu():
    code = "import lora_kernels, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
