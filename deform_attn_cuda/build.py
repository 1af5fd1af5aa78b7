"""Compiles the CUDA sources and binding.cpp into one shared library with nvcc.

Used by __init__.py (at the first use) and setup.py (ahead).

Nothing but nvcc and a C++ compiler is needed: no ninja, no GPU. The library names PyTorch's own libraries without their
place: they are found because the process that loads it has imported torch.
"""
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
SOURCES = ("forward.cu", "backward.cu", "binding.cpp")
HEADERS = ("deform_attn.h", "geometry.cuh", "windows.cuh", "forward_window.cuh", "instances.cuh", "bins.cuh",
           "point_gradients.cuh", "value_gradient.cuh")
OLDEST_TORCH = 0x020B000000000000      # 2.11: the stable interface that the library asks for, whatever torch builds it


class BuildError(RuntimeError):
    """The library cannot be built here; says why."""


def source_digest() -> str:
    """Names the version of the sources: libraries of other versions are never loaded."""
    digest = hashlib.sha256()
    for name in SOURCES + HEADERS:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:12]


def library_name(architectures: list[str]) -> str:
    """File name of the library: version of the sources, then the architectures it holds, as "9.0" or "9.0+PTX"."""
    return f"deform_attn_{source_digest()}_{'_'.join(architectures)}.so"


def wanted_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST if set, else those of the GPUs seen, else Ampere, Hopper and what follows.

    Raises BuildError if the variable holds something else than numbers such as "8.0;9.0+PTX".
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST holds {name!r}; expected numbers such as 8.0;9.0+PTX")
    if listed:
        return sorted(set(listed))
    if torch.cuda.is_available():
        seen = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        return [f"{major}.{minor}" for major, minor in sorted(seen)]
    return ["8.0", "9.0+PTX"]


def find_nvcc() -> str:
    """Path of nvcc: in CUDA_HOME or CUDA_PATH, on PATH, or in /usr/local/cuda. Raises BuildError naming the places tried."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    tried = [Path(root, "bin", "nvcc") for root in roots] + ([Path(on_path)] if on_path else [])
    tried.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in tried:
        if path.is_file():
            return str(path)
    raise BuildError(f"nvcc was not found; tried PATH, {', '.join(map(str, tried))}")


def build_library(target: Path, architectures: list[str]) -> None:
    """Write the library to `target`, whole or not at all. Raises BuildError with the compiler's words."""
    nvcc = find_nvcc()
    codes = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        kinds = ["sm", "compute"] if architecture.endswith("+PTX") else ["sm"]
        codes += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    pytorch = Path(torch.__file__).parent
    compilers = []
    for name in SOURCES:
        options = [*codes, "--threads=0"] if name.endswith(".cu") else [
            f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}ULL", "-DUSE_CUDA", f"-I{pytorch / 'include'}"]
        compilers.append([nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC", *options,
                          "-c", str(FOLDER / name), "-o", f"{name}.o"])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    linker = [nvcc, "-shared", "-Xcompiler=-fPIC", *(f"{name}.o" for name in SOURCES), "-o", str(partial),
              f"-L{pytorch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    with tempfile.TemporaryDirectory() as folder:
        run_together(compilers, folder)
        try:
            run_together([linker], folder)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def run_together(commands: list[list[str]], folder: str) -> None:
    """Run all, wait for all, then raise BuildError with the end of what the first that failed printed."""
    running = [subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, encoding="utf-8", errors="replace")
               for command in commands]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs):
        if process.returncode:
            raise BuildError(f"{' '.join(process.args)} failed:\n{output[-2000:]}")
