"""The library built beside setup.py, from its sources and flags: what is added is added here.

AVX-512, AVX512-BF16 and AMX can be emulated, for a machine that has AVX2 alone.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from building import flags, folders, ninja, sources, toolchain
from kept import one_at_a_time
from places import LIB, ROOT

CSRC = ROOT / "csrc"
EMULATED = ("avx512", "avx512_bf16", "amx")
FRESH = "-DCLINATTN_FRESH_SCRATCH"  # scratch is allocated anew for each call


def compiler_file(name: str) -> str | None:
    """The path of one of the compiler's own libraries; None where it has no such."""
    command = [*toolchain.compiler(), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found if os.path.isabs(found) else None


def units(emulated: tuple[str, ...], added: tuple[str, ...]) -> dict[str, ninja.Unit]:
    """Sources and flags by the names of their objects."""
    emulator = ["-O2", "-Wno-psabi", "-include"]
    found = sources.units()
    for name in emulated:
        path = CSRC / "cpu" / f"isa_{name}.cpp"
        mine = [*flags.isa_common_flags(), f"-I{CSRC}", *flags.AVX2, *emulator]
        found[f"isa_{name}"] = ninja.Unit(path, [*mine, str(LIB / f"csrc/emulated_{name}.h")])
    if emulated:
        having = [f"-DCLINATTN_HAVE_{name.upper()}" for name in emulated]
        probes = [*having, "-include", str(LIB / "csrc/emulated_cpu.h")]
        found["cpu_dispatch"] = with_flags(found["cpu_dispatch"], probes)
        found["facts"] = with_flags(found["facts"], having)
    return {name: with_flags(unit, [*added, FRESH]) for name, unit in found.items()}


def with_flags(unit: ninja.Unit, added: Iterable[str]) -> ninja.Unit:
    return ninja.Unit(unit.source, [*unit.flags, *added])


@functools.cache
def build(folder: Path, emulated: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Path:
    """The module clinattn._C beside its library; what is unchanged is kept.

    added: flags of the compiler and the linker.
    """
    library = ninja.Library(folders.LIBRARY, [], [*added, *flags.link_flags()])
    compiler = toolchain.cached_compiler()
    with one_at_a_time(folder):
        ninja.build(f"in build/{folder.name}", compiler, units(emulated, added), folder, library)
        return Path(shutil.copy(ROOT / "clinattn" / "_C.py", folder))


def load(path: Path) -> None:
    """Make it clinattn._C."""
    assert "clinattn" not in sys.modules, "clinattn has its own module already"
    spec = importlib.util.spec_from_file_location("clinattn._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["clinattn._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["clinattn._C"])
