"""clinattn._C built beside setup.py, from its sources and flags: what is added is added here.

AVX-512 and AMX can be emulated, for a machine that has AVX2 alone.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from building import flags, ninja, sources, toolchain
from kept import one_at_a_time
from places import LIB, ROOT
from torch.utils.cpp_extension import include_paths, library_paths

CSRC = ROOT / "csrc"
EMULATED = ("avx512", "amx")
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def compiler_file(name: str) -> str | None:
    """The path of one of the compiler's own libraries; None where it has no such."""
    command = [*toolchain.compiler(), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found if os.path.isabs(found) else None


def units(emulated: tuple[str, ...], added: tuple[str, ...]) -> dict[str, ninja.Unit]:
    """Sources and flags by the names of their objects."""
    include = f"-I{CSRC}"
    isa = [*flags.isa_common_flags(), include]
    emulator = ["-O2", "-Wno-psabi", "-include"]
    probes = ["-include", str(LIB / "csrc/emulated_cpu.h")] if emulated else []
    of_sets = {name: [*isa, *flags.ISA_FLAGS[name]] for name in sources.isa_units()}
    of_sets |= {
        x: [*isa, *flags.AVX2, *emulator, str(LIB / f"csrc/emulated_{x}.h")] for x in emulated
    }
    having = [f"-DCLINATTN_HAVE_{name.upper()}" for name in of_sets]
    torch_side = [*flags.COMMON_FLAGS, "-std=c++20", "-fopenmp", include, *having]
    torch_side += ["-DTORCH_EXTENSION_NAME=_C", f"-I{sysconfig.get_paths()['include']}"]
    torch_side += [f"-isystem{path}" for path in include_paths()]
    found = {f"isa_{x}": (CSRC / "cpu" / f"isa_{x}.cpp", mine) for x, mine in of_sets.items()}
    for path in sources.torch_sources():
        name = "_".join(path.relative_to(CSRC).with_suffix("").parts)
        found[name] = path, torch_side + probes * (path.stem == "dispatch")
    return {name: ninja.Unit(path, [*mine, *added]) for name, (path, mine) in found.items()}


def built_by_setup(path: Path) -> Path | None:
    """The object that setup.py made of a source on torch's side, if none has changed since."""
    places = (ROOT / "build").glob(f"*{sys.implementation.cache_tag}-torch{torch.__version__}")
    objects = [x / path.relative_to(ROOT).with_suffix(".o") for x in places]
    newest = max(x.stat().st_mtime for x in CSRC.rglob("*") if x.is_file())
    return next((x for x in objects if x.exists() and x.stat().st_mtime > newest), None)


@functools.cache
def build(folder: Path, emulated: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Path:
    """The module; what is unchanged is kept. added: flags of the compiler and the linker."""
    (libraries,) = library_paths()
    link = [*added, f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    link += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    with one_at_a_time(folder):
        mine, ready = {}, []
        for name, unit in units(emulated, added).items():
            same = not added and not name.startswith("isa_") and unit.source.stem != "dispatch"
            if there := built_by_setup(unit.source) if same else None:
                ready.append(str(there))
            else:
                mine[name] = unit
        library = ninja.Library(MODULE, ready, link)
        compiler = toolchain.cached_compiler()
        ninja.build(f"in build/{folder.name}", compiler, mine, folder, library)
    return folder / MODULE


def load(path: Path) -> None:
    """Make it clinattn._C."""
    assert "clinattn" not in sys.modules, "clinattn has its own module already"
    spec = importlib.util.spec_from_file_location("clinattn._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["clinattn._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["clinattn._C"])
