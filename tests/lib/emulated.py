"""The CUDA kernels as a C++ compiler makes them, for CPU tensors: csrc/emulator.h is the GPU.

    with emulated_cuda():
        clinattn.fused_attention(q, k, v, backend="cuda")
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from building import flags, ninja, sources, toolchain
from kept import one_at_a_time
from places import LIB, ROOT

from clinattn.backends import cuda
from clinattn.backends.backend import Backend
from clinattn.backends.select import register

CUDA = ROOT / "csrc" / "cuda"
LIBRARY = "clinattn_cuda_emulated.so"
CAPABILITY = "CLINATTN_EMULATED_CAPABILITY"  # which the library reads
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
FLAGS += ["-DCLINATTN_EMULATED", f"-I{ROOT / 'csrc'}", f"-I{LIB / 'csrc'}"]


def missing() -> str | None:
    """Names a tool that the build needs and this machine lacks; None if it has all."""
    compiler = toolchain.compiler()[0]
    if shutil.which(compiler) is None:
        return f"{compiler} is not installed"
    return None if ninja.program() else "ninja is not installed"


@functools.cache
def build(
    folder: Path = ROOT / "build" / "emulated", kernels: Path = CUDA, more: tuple[str, ...] = ()
) -> Path:
    """The library of the .cu files in `kernels` and their torch side; what is unchanged is kept.

    more: flags of the compiler and the linker.
    """
    named = {x.stem: ninja.Unit(x, ["-x", "c++"]) for x in sorted(kernels.glob("*.cu"))}
    torch_side = [ROOT / "csrc" / name for name in ("call.cpp", "tensor.cpp")]
    named |= sources.torch_units([*torch_side, *sorted(CUDA.glob("*.cpp"))], [])
    named = {name: ninja.Unit(x, [*FLAGS, *mine, *more]) for name, (x, mine) in named.items()}
    library = ninja.Library(LIBRARY, [], [*flags.link_flags(), *more])
    with one_at_a_time(folder):
        ninja.build(f"in build/{folder.name}", toolchain.cached_compiler(), named, folder, library)
    return folder / LIBRARY


def stand_in(library: Path) -> Backend:
    """Makes this library's kernels backend "cuda" on CPU tensors; returns what was that before."""
    torch.ops.load_library(library)

    def reasons_against(device: torch.device | None) -> list[str]:
        served = device is None or device.type == "cpu"
        return [] if served else cuda.reasons_against(device)

    notes = lambda: ("emulated on CPU tensors",)
    return register(cuda.BACKEND._replace(reasons_against=reasons_against, notes=notes))


@contextmanager
def emulated_cuda(capability: int = 80) -> Iterator[None]:
    """Backend "cuda" serves CPU tensors, by the kernels for cards of a compute capability."""
    before = os.environ.get(CAPABILITY)
    os.environ[CAPABILITY] = str(capability)
    cuda = stand_in(build())
    try:
        yield
    finally:
        os.environ.pop(CAPABILITY) if before is None else os.environ.update({CAPABILITY: before})
        register(cuda)


if __name__ == "__main__":
    print(build())
