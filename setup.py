"""Hands the compiled part over to CMake and ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
NAME = "lora_kernels._torch"


def _outside_the_isolated_build() -> str:
    """The folder of the torch that this interpreter has without its PYTHON* variables, or ''.

    pip's isolated build is the target environment's own interpreter, from which PYTHONPATH and
    what it leads to hide that environment's packages.
    """
    code = (
        "from importlib.util import find_spec; spec = find_spec('torch'); "
        "print(*spec.submodule_search_locations if spec else '')"
    )
    run = subprocess.run([sys.executable, "-E", "-c", code], stdout=subprocess.PIPE, text=True)
    return run.stdout.strip()


def torch_folder() -> Path:
    """The installed torch to build against; one is never fetched for the build."""
    spec = find_spec("torch")
    seen = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
    found = os.environ.get("LORA_KERNELS_TORCH") or seen or _outside_the_isolated_build()
    if not found:
        sys.exit(
            "lora_kernels: torch is not installed in this environment, and it is needed to build. "
            "Install it first (a CPU build is enough): pip install 'torch>=2.10'. A tool that "
            "builds in an environment of its own needs "
            "LORA_KERNELS_TORCH=/path/to/site-packages/torch."
        )
    about = Path(found, "version.py")
    version = re.search(
        r"__version__ = '(\d+)\.(\d+)", about.read_text() if about.is_file() else ""
    )
    if version is None or tuple(map(int, version.groups())) < (2, 10):
        sys.exit(
            f"lora_kernels: expected torch 2.10 or later in {found}, got "
            f"{'.'.join(version.groups()) if version else 'no version.py'}; run pip install "
            "'torch>=2.10' first, or name its folder in LORA_KERNELS_TORCH."
        )
    return Path(found).resolve()


class EarlyRefusal(dist_info):
    """Asks for torch before pip, for want of it, downloads gigabytes and then cannot build."""

    def run(self) -> None:
        torch_folder()
        super().run()


class CMakeBuild(build_ext):
    """Builds the target of CMakeLists.txt and puts it beside the package's modules.

    Environment: LORA_KERNELS_TORCH, LORA_KERNELS_CUDA (AUTO, ON, OFF), MAX_JOBS, CMAKE_ARGS.
    """

    def get_ext_filename(self, fullname: str) -> str:
        # Without the interpreter's tag; setuptools asks with and without the package's name.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            # Named anew each time: the one of the last build is gone with its environment.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DLORA_KERNELS_TORCH={torch_folder()}",
            f"-DLORA_KERNELS_CUDA={os.environ.get('LORA_KERNELS_CUDA', 'AUTO')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "_torch.so", target)
        self._copy_plugins(target.parent)

    def _copy_plugins(self, folder: Path) -> None:
        """The TensorRT plugins, where they were built."""
        for plugins in Path(self.build_temp).glob("liblora_kernels_tensorrt*.so"):
            shutil.copy2(plugins, folder)

    def copy_extensions_to_source(self) -> None:
        """An editable install has its libraries beside the sources."""
        super().copy_extensions_to_source()
        self._copy_plugins(ROOT / "lora_kernels")


class PlatformWheel(bdist_wheel):
    """The library holds no Python symbols: one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(NAME, sources=[])],
    cmdclass={
        "build_ext": CMakeBuild,
        "bdist_wheel": PlatformWheel,
        "dist_info": EarlyRefusal,
    },
)
