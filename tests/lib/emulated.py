"""The CUDA kernels as a C++ compiler makes them, for CPU tensors: csrc/emulator.h is the GPU.

    with emulated_cuda():
        clinattn.fused_attention(q, k, v, backend="cuda")

From a shell: CLINATTN_EMULATE_CUDA=$(python tests/lib/emulated.py) python script.py
"""

from __future__ import annotations

import functools
import importlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from places import ROOT
from torch.utils.cpp_extension import include_paths, library_paths

CUDA = ROOT / "csrc" / "cuda"
LIBRARY = "clinattn_cuda_emulated.so"
# A contraction that the compiler chooses is not what the kernels say.
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
]
FLAGS += ["-DCLINATTN_EMULATED", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'csrc'}"]


def missing() -> str | None:
    """What the build needs and this machine lacks."""
    for tool in (compiler()[0], "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return None


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def torch_libraries() -> list[str]:
    (folder,) = library_paths()
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch_cpu", "-ltorch"]


@functools.cache
def build(folder: Path = ROOT / "build" / "emulated", kernels: Path = CUDA) -> Path:
    """The library of the .cu files in `kernels` and their torch side; what is unchanged is kept."""
    torch_flags = [f"-isystem{path}" for path in include_paths()]
    units = {path.stem: (path, ["-x", "c++"]) for path in sorted(kernels.glob("*.cu"))}
    for path in (ROOT / "csrc" / "arguments.cpp", *sorted(CUDA.glob("*.cpp"))):
        units[f"torch_{path.stem}"] = path, torch_flags
    lines = [
        f"cxx = {shlex.join([*compiler(), *FLAGS])}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out {shlex.join(torch_libraries())}",
    ]
    for name, (path, flags) in units.items():
        lines += [f"build {name}.o: cxx {path}", f"  flags = {shlex.join(flags)}"]
    lines.append(f"build {LIBRARY}: link {' '.join(f'{name}.o' for name in units)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    command = ["ninja", "-C", folder, *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / LIBRARY


@contextmanager
def emulated_cuda(capability: int = 80) -> Iterator[None]:
    """Backend "cuda" serves CPU tensors, by the kernels for cards of a compute capability."""
    settings = {
        "CLINATTN_EMULATE_CUDA": str(build()),
        "CLINATTN_EMULATED_CAPABILITY": str(capability),
    }
    before = {name: os.environ.get(name) for name in settings}
    chosen = importlib.import_module("clinattn.backends")._select
    os.environ.update(settings)
    chosen.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        chosen.cache_clear()


if __name__ == "__main__":
    print(build())
