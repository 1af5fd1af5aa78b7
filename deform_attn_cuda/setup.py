"""Builds the kernels ahead of their first use:

    python -m pip install --no-build-isolation ./deform_attn_cuda

No GPU is needed. TORCH_CUDA_ARCH_LIST="8.0;9.0" selects the architectures; the default is those of
the visible GPUs, or 8.0 and 9.0+PTX.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

if not any(importlib.util.find_spec(name) for name in ("setuptools.command.bdist_wheel", "wheel")):
    sys.exit(
        "setuptools before 70.1 makes no wheels; run: python -m pip install --upgrade setuptools"
    )

spec = importlib.util.spec_from_file_location("build_kernel", Path(__file__).with_name("build.py"))
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        architectures = build.wanted_architectures()
        library = Path(self.build_lib, "deform_attn_cuda", build.library_name(architectures))
        build.build_library(library.resolve(), architectures)


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:  # the wheel is for this platform only
        return True


setup(
    name="deform_attn_cuda",
    version="1.0",
    description="Multi-scale deformable attention in CUDA: a plain kernel and a tuned one",
    packages=["deform_attn_cuda"],
    package_dir={"deform_attn_cuda": "."},
    package_data={"deform_attn_cuda": [*build.SOURCES, *build.HEADERS]},
    install_requires=["torch>=2.11"],
    cmdclass={"build_py": BuildWithLibrary},
    distclass=BinaryDistribution,
)
