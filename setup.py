"""Hands the compiled part over to CMake and ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAME = "lora_kernels._torch"


class CMakeBuild(build_ext):
    """Builds the target of CMakeLists.txt and puts it beside the package's modules.

    Environment: LORA_KERNELS_CUDA (AUTO, ON, OFF), MAX_JOBS, CMAKE_ARGS.
    """

    def get_ext_filename(self, fullname: str) -> str:
        # Without the interpreter's tag; setuptools asks with and without the package's name.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            sys.exit(
                "lora_kernels: torch is not installed in this environment, and it is needed to "
                "build. Install it first (a CPU build is enough), then run pip with "
                f"--no-build-isolation. ({error})"
            )
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
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLORA_KERNELS_CUDA={os.environ.get('LORA_KERNELS_CUDA', 'AUTO')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "_torch.so", target)


class PlatformWheel(bdist_wheel):
    """The library holds no Python symbols: one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(NAME, sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
