"""Compiles plain.cu, tuned/ and binding.cpp into one shared library with nvcc.

Used by __init__.py at the first call, and by setup.py ahead of it. This needs nvcc and a C++
compiler, but no GPU and no ninja. The library is linked to PyTorch's libraries without their paths:
they are found because the process that loads it has imported torch.
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
SOURCES = ("binding.cpp", "plain.cu", "tuned/launch.cu")
HEADERS = (
    "deform_attn.h",
    "tuned/geometry.cuh",
    "tuned/forward.cuh",
    "tuned/bins.cuh",
    "tuned/point_gradients.cuh",
    "tuned/value_gradient.cuh",
)
OLDEST_TORCH = 0x020B000000000000  # 2.11: the version of the stable ABI that the library needs


class BuildError(RuntimeError):
    """The library cannot be built; the message says why."""


def source_digest() -> str:
    """Identifies the sources: libraries built from others are never loaded."""
    digest = hashlib.sha256()
    for name in SOURCES + HEADERS:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:12]


def library_name(architectures: list[str]) -> str:
    """File name of the library: digest of the sources, then architectures such as "9.0+PTX"."""
    return f"deform_attn_{source_digest()}_{'_'.join(architectures)}.so"


def wanted_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST if set, else those of the visible GPUs, else 8.0 and 9.0+PTX.

    Raises BuildError if the variable holds anything but numbers such as "8.0;9.0+PTX".
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST holds {name!r}; expected numbers such as 8.0;9.0+PTX"
            )
    if listed:
        return sorted(set(listed))
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        capabilities = {torch.cuda.get_device_capability(index) for index in devices}
        return [f"{major}.{minor}" for major, minor in sorted(capabilities)]
    return ["8.0", "9.0+PTX"]


def find_nvcc() -> str:
    """Path of nvcc: in CUDA_HOME or CUDA_PATH, on PATH, or in /usr/local/cuda.

    Raises BuildError with the paths that were tried.
    """
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    tried = [Path(root, "bin", "nvcc") for root in roots] + ([Path(on_path)] if on_path else [])
    tried.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in tried:
        if path.is_file():
            return str(path)
    raise BuildError(f"nvcc was not found; tried PATH, {', '.join(map(str, tried))}")


def gencode_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for architectures such as "8.0" (machine code) or "9.0+PTX" (PTX as well)."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        kinds = ["sm", "compute"] if architecture.endswith("+PTX") else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def build_library(target: Path, architectures: list[str]) -> None:
    """Write the library to `target`, atomically. Raises BuildError with the compiler's output."""
    nvcc, pytorch = find_nvcc(), Path(torch.__file__).parent
    options = {
        ".cu": [*gencode_flags(architectures), "--threads=0"],
        ".cpp": [
            f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}ULL",
            "-DUSE_CUDA",
            f"-I{pytorch / 'include'}",
        ],
    }
    objects = {name: name.replace("/", "_") + ".o" for name in SOURCES}
    compilers = [
        [
            nvcc,
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC",
            *options[Path(name).suffix],
            "-c",
            str(FOLDER / name),
            "-o",
            objects[name],
        ]
        for name in SOURCES
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    linker = [
        nvcc,
        "-shared",
        "-Xcompiler=-fPIC",
        *objects.values(),
        "-o",
        str(partial),
        f"-L{pytorch / 'lib'}",
        "-ltorch_cpu",
        "-ltorch_cuda",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run_together(compilers, folder)
        try:
            run_together([linker], folder)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def run_together(commands: list[list[str]], folder: str) -> None:
    """Run all commands at once and wait for all of them.

    Raises BuildError with the end of the output of the first that failed.
    """
    running = [
        subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs):
        if process.returncode:
            raise BuildError(f"{' '.join(process.args)} failed:\n{output[-2000:]}")
