"""clinattn._C built beside setup.py, from its sources and flags: what is added is added here.

AVX-512 and AMX can be emulated, for a machine that has AVX2 alone.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from places import ROOT
from torch.utils.cpp_extension import include_paths, library_paths

CSRC = ROOT / "csrc"
EMULATED = ("avx512", "amx")
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
TOOLS = str(Path(sys.executable).parent)  # ninja may live beside this Python alone


@functools.cache
def setup() -> dict[str, Any]:
    """The names of setup.py."""
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, {"CLINATTN_SKIP_EXT": "1"}):
        folder = os.getcwd()
        try:
            return runpy.run_path(str(ROOT / "setup.py"))
        finally:
            os.chdir(folder)


def missing() -> str | None:
    """Names what the build needs and this machine lacks."""
    with mock.patch.dict(os.environ, {"PATH": TOOLS + os.pathsep + os.environ["PATH"]}):
        folder = os.getcwd()
        os.chdir(ROOT)
        try:
            return setup()["missing"]()
        finally:
            os.chdir(folder)


def compiler_file(name: str) -> str | None:
    """The path of one of the compiler's own libraries; None where it has no such."""
    command = [*setup()["compiler"](), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found if os.path.isabs(found) else None


def native_sets() -> dict[str, list[str]]:
    """Flags by the names of the instruction sets that this compiler builds."""
    names = setup()
    folder = os.getcwd()
    os.chdir(ROOT)
    try:
        return {name: names["ISA_FLAGS"][name] for name in names["isa_units"]()}
    finally:
        os.chdir(folder)


def units(emulated: tuple[str, ...], added: tuple[str, ...]) -> dict[str, tuple[Path, list[str]]]:
    """Sources and flags by the names of their objects."""
    names = setup()
    include = f"-I{CSRC}"
    isa = [*names["isa_common_flags"](), include]
    emulator = ["-O2", "-Wno-psabi", "-include"]
    probes = ["-include", str(ROOT / "tests/lib/csrc/emulated_cpu.h")] if emulated else []
    of_sets = {x: [*isa, *flags] for x, flags in native_sets().items()}
    of_sets |= {
        x: [*isa, *names["AVX2"], *emulator, str(ROOT / f"tests/lib/csrc/emulated_{x}.h")]
        for x in emulated
    }
    having = [f"-DCLINATTN_HAVE_{name.upper()}" for name in of_sets]
    torch_side = [*names["COMMON_FLAGS"], "-std=c++20", "-fopenmp", include, *having]
    torch_side += ["-DTORCH_EXTENSION_NAME=_C", f"-I{sysconfig.get_paths()['include']}"]
    torch_side += [f"-isystem{path}" for path in include_paths()]
    found = {f"isa_{x}": (CSRC / "cpu" / f"isa_{x}.cpp", flags) for x, flags in of_sets.items()}
    for path in sorted(CSRC.rglob("*.cpp")):
        if path.parent != CSRC / "cuda" and not path.stem.startswith("isa_"):
            name = "_".join(path.relative_to(CSRC).with_suffix("").parts)
            found[name] = path, torch_side + probes * (path.stem == "dispatch")
    return {name: (path, [*flags, *added]) for name, (path, flags) in found.items()}


def built_by_setup(path: Path) -> Path | None:
    """The object that setup.py made of a source on torch's side, if none has changed since."""
    places = (ROOT / "build").glob(f"*{sys.implementation.cache_tag}-torch{torch.__version__}")
    objects = [x / path.relative_to(ROOT).with_suffix(".o") for x in places]
    newest = max(x.stat().st_mtime for x in CSRC.rglob("*") if x.is_file())
    return next((x for x in objects if x.exists() and x.stat().st_mtime > newest), None)


@functools.cache
def build(folder: Path, emulated: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Path:
    """The module; what is unchanged is kept. added: flags of the compiler and the linker."""
    compiler = [*setup()["compiler"]()]
    (libraries,) = library_paths()
    link = ["-shared", *added, f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    link += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    lines = [
        f"cxx = {shlex.join(compiler)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in -o $out {shlex.join(link)}",
    ]
    objects = []
    for name, (path, flags) in units(emulated, added).items():
        same = not added and not name.startswith("isa_") and path.stem != "dispatch"
        ready = built_by_setup(path) if same else None
        objects.append(str(ready or f"{name}.o"))
        if ready is None:
            lines += [f"build {name}.o: cxx {path}", f"  flags = {shlex.join(flags)}"]
    lines.append(f"build {MODULE}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    command = ["ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])]
    path = {"PATH": TOOLS + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / MODULE


def load(path: Path) -> None:
    """Make it clinattn._C."""
    assert "clinattn" not in sys.modules, "clinattn has its own module already"
    spec = importlib.util.spec_from_file_location("clinattn._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["clinattn._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["clinattn._C"])
