"""The C++ and CUDA files of the library, and which of them can be compiled here."""

from __future__ import annotations

import platform
from pathlib import Path

from build_support.flags import ISA_FLAGS, isa_common_flags, torch_flags
from build_support.folders import CSRC
from build_support.ninja import Unit
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


def units() -> dict[str, Unit]:
    """The files that serve CPU tensors, by the names of their objects, with their flags.

    Files of an instruction set are compiled with its flags, and without torch's headers.
    """
    sets = isa_units()
    isa = {
        f"isa_{name}": Unit(path, [*isa_common_flags(), *ISA_FLAGS[name], f"-I{CSRC}"])
        for name, path in sets.items()
    }
    return isa | torch_units(torch_sources(), [f"-DCLINATTN_HAVE_{name.upper()}" for name in sets])


def torch_units(paths: list[Path], more: list[str]) -> dict[str, Unit]:
    """Files that include torch, by the names of their objects. more: flags beside torch's."""
    return {object_name(path): Unit(path, [*torch_flags(), *more]) for path in paths}


def object_name(path: Path) -> str:
    return "_".join(path.relative_to(CSRC).with_suffix("").parts)
