"""The C++ and CUDA files of clinattn._C, and which of them can be compiled here."""

from __future__ import annotations

import platform
from pathlib import Path

from build_support.flags import ISA_FLAGS
from build_support.folders import CSRC
from build_support.toolchain import accepts


def isa_units() -> dict[str, Path]:
    """The instruction-set units that this machine's architecture and compiler can build."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = [name for name in (ISA_FLAGS if x86 else ["scalar"]) if accepts(ISA_FLAGS[name])]
    units = {name: CSRC / "cpu" / f"isa_{name}.cpp" for name in names}
    return {name: path for name, path in units.items() if path.exists()}


def torch_sources() -> list[Path]:
    """The files that include torch and serve CPU tensors."""
    found = (path for path in CSRC.rglob("*.cpp") if not path.stem.startswith("isa_"))
    return sorted(path for path in found if path.parent != CSRC / "cuda")


def cuda_sources() -> tuple[list[Path], list[Path]]:
    """The files of the CUDA kernels for nvcc, and those of their torch side."""
    return sorted((CSRC / "cuda").glob("*.cu")), sorted((CSRC / "cuda").glob("*.cpp"))
