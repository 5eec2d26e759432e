"""Instruction sets of the CPU kernels: built, usable here or why not, in force, how fast."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from clinattn.tools.peaks import Measured

CPUINFO = Path("/proc/cpuinfo")
VARIABLE = "CLINATTN_CPU_ISA"

# Each set, slowest first, with what a processor must have for it besides what those before it need:
# names in /proc/cpuinfo of what csrc/cpu/dispatch.cpp asks the processor for.
FLAGS: dict[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}
NAMES = tuple(FLAGS)

# arch_prctl of Linux on x86-64
SYSCALL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


class InstructionSet(NamedTuple):
    """A set of the CPU kernels. lacking: the processor's part of the reason why it is not usable.

    reason: why it is not usable, None where it is. peak, attention: FLOP/s of a thread by "fp32"
    and "bf16", None where they were not measured.
    """

    name: str
    built: bool
    usable: bool
    in_force: bool
    reason: str | None = None
    lacking: tuple[str, ...] = ()
    peak: dict[str, float] | None = None
    attention: dict[str, float] | None = None


def instruction_sets(
    module: ModuleType | None, in_force: str | None, measured: Measured | None
) -> list[InstructionSet]:
    """Returns the rows of the table, slowest set first; none without the compiled module.

    in_force: None where none is, because the one asked for is refused. measured: by peaks.measure.
    """
    if module is None:
        return []
    info, usable, flags = module.build_info(), module.instruction_sets(), processor_flags()
    built = info["instruction_sets"].split()
    peaks, attention = ({}, {}) if measured is None else measured
    rows = []
    for name in NAMES if len(built) > 1 or flags else built:
        lacking = _lacking(name, flags)
        rows.append(
            InstructionSet(
                name,
                name in built,
                name in usable,
                name == in_force,
                None if name in usable else _reason(name, name in built, info, lacking, flags),
                () if name in usable else lacking,
                peaks.get(name),
                attention.get(name),
            )
        )
    return rows


def refusal(module: ModuleType | None) -> str | None:
    """Returns why the set that CLINATTN_CPU_ISA names is refused; None where it is not.

    Where it is, the best set is in force in this process from here on.
    """
    if module is None:
        return None
    try:
        module.instruction_set()
    except ValueError as error:
        module.set_instruction_set("")
        return str(error)
    return None


def processor_flags() -> set[str] | None:
    """Features of the processor by Linux's names; None where nothing tells."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    return next((set(line.split(":")[1].split()) for line in lines if line[:5] == "flags"), None)


def tile_refusal() -> str | None:
    """Returns the system's words for refusing AMX's registers to this process, None if it grants.

    None, too, where such a question cannot be asked.
    """
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        numbers = (ctypes.c_long(x) for x in (SYSCALL, REQUEST_PERMISSION, TILE_DATA))
        if libc.syscall(*numbers) == 0:
            return None
    except (OSError, TypeError, AttributeError):
        return None
    return os.strerror(ctypes.get_errno())


def _lacking(name: str, flags: set[str] | None) -> tuple[str, ...]:
    """Returns the features that the processor lacks for a set, or else for one before it."""
    if flags is None:
        return ()
    for needed in (name, *NAMES[: NAMES.index(name)]):
        if missing := tuple(x for x in FLAGS[needed] if x not in flags):
            return missing
    return ()


def _reason(
    name: str, built: bool, info: dict[str, str], lacking: tuple[str, ...], flags: set[str] | None
) -> str:
    if lacking:
        shown = ", as its hypervisor shows it," if flags and "hypervisor" in flags else ""
        return f"the processor{shown} lacks {', '.join(lacking)}"
    if not built:
        return f"the compiler of this build ({info.get('compiler', 'unknown')}) does not know it"
    if name == "amx" and (words := tile_refusal()):
        return f"the kernel refuses its registers to this process ({words})"
    return "the system does not offer it"
