"""Everything declarative is in pyproject.toml; this compiles the C++ kernels into the package with VOT_BUILD_CPU=1.

Otherwise the wheel is pure Python and building needs setuptools alone. Torch is never imported here.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WITH_KERNELS = os.environ.get("VOT_BUILD_CPU", "0") not in ("", "0")


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if WITH_KERNELS:
            self._compile()

    def _compile(self) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        from vot_kernels.cpp import build, paths

        if self.editable_mode:
            build.build()
            return
        folder = Path(self.build_lib, "vot_kernels", "cpp", "lib")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            library = build.build(Path(scratch), build.portable_isas())
            for path in (library, paths.stamp_of(library)):
                shutil.copy(path, folder)


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        return WITH_KERNELS


class Wheel(bdist_wheel):
    """With kernels it belongs to this kind of processor, but still to every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if WITH_KERNELS else tag


setup(distclass=Package, cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
