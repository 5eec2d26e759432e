"""The compiled library: loading it registers the kernels with torch's dispatcher.

It is a plain shared library beside this file, for every Python and every torch from 2.11 on.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch  # noqa: F401  the library is linked to torch's, which are then loaded

LIBRARY = "libclinattn.so"

_library = ctypes.CDLL(str(Path(__file__).with_name(LIBRARY)))
for _name in ("build_info", "instruction_sets", "instruction_set", "complaint"):
    getattr(_library, f"clinattn_{_name}").restype = ctypes.c_char_p
_library.clinattn_set_instruction_set.restype = ctypes.c_bool
_library.clinattn_peak_flops.restype = ctypes.c_double


def instruction_sets() -> list[str]:
    """Instruction sets usable here, best last."""
    return _library.clinattn_instruction_sets().decode().split()


def instruction_set() -> str:
    """The instruction set in force."""
    name = _library.clinattn_instruction_set()
    if name is None:
        raise _refused()
    return name.decode()


def set_instruction_set(name: str) -> None:
    """Forces an instruction set; "" goes back to the best one."""
    if not _library.clinattn_set_instruction_set(name.encode()):
        raise _refused()


def peak_flops(dtype: str) -> float:
    """FLOP/s that multiply-adds in registers reach on torch's threads, for kernels of a dtype."""
    reached = _library.clinattn_peak_flops(dtype.encode())
    if not reached:
        raise _refused()
    return reached


def build_info() -> dict[str, str]:
    """The facts of the build: torch, compiler, instruction_sets, cuda_archs, cuda_toolkit."""
    lines = _library.clinattn_build_info().decode().splitlines()
    return dict(line.split("\t", 1) for line in lines)


def _refused() -> ValueError:
    return ValueError(_library.clinattn_complaint().decode())
