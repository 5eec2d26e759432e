"""The library as setuptools builds it, or the reason why that fails."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from build_support import ninja
from build_support.cuda import cuda_parts, wants_cuda
from build_support.flags import link_flags
from build_support.folders import CSRC, LIBRARY, ROOT
from build_support.sources import torch_sources, units
from build_support.toolchain import cached_compiler, compiler, complaint
from build_support.torch_here import torch_folder

REMEDY = """
clinattn: no kernels were built, and nothing is installed. What helps, the quickest first:
  a wheel of clinattn, which carries them and needs no compiler
  what the reason above names, and then the same command again
  CLINATTN_SKIP_EXT=1 with the same command, for the slow reference in plain torch alone"""


def extensions() -> dict[str, Any]:
    """Returns setup()'s arguments for the library; none, with a message, if it is left out.

    They do not depend on what is installed: an archive of the sources is the same everywhere.
    """
    if os.environ.get("CLINATTN_SKIP_EXT") == "1":
        print("clinattn: CLINATTN_SKIP_EXT=1, so no kernels are built", file=sys.stderr)
        return {}
    # setuptools wants sources, and asks for files by them; build_library knows them.
    sources = [str(path.relative_to(ROOT)) for path in torch_sources()]
    library = Extension(f"clinattn.{LIBRARY.removesuffix('.so')}", sources)
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


def missing() -> str | None:
    """Returns the reason why the library cannot be built here, with the remedy, or None."""
    if not (CSRC / "facts.cpp").exists():
        return "the C++ sources are not part of this tree: take the whole repository or archive"
    folder = torch_folder()
    if folder is None:
        return (
            f"{sys.executable} has no torch, against whose headers the kernels are compiled: pip "
            "install torch (2.11 or newer), then pip install --no-build-isolation with setuptools "
            "and ninja installed, too"
        )
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        return f"{folder} has no headers of torch's stable ABI: expected torch 2.11 or newer"
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler: {compiler()[0]!r} is not on PATH (install g++ or set CXX)"
    if ninja.program() is None:
        return "ninja is not on PATH (pip install ninja)"
    if refusal := complaint("int main() {}", ["-std=c++20"]):
        return f"{shlex.join(compiler())} compiles no program in C++20: {refusal}"
    return None


def build_library(folder: Path) -> Path:
    """Brings the library in a folder up to date, with the CUDA kernels where they can be built."""
    if wants_cuda():
        return link(folder, *cuda_parts(folder / "cuda"))
    return link(folder, {}, ninja.Library(LIBRARY, [], link_flags()))


def link(folder: Path, more: dict[str, ninja.Unit], library: ninja.Library) -> Path:
    """Compiles the files for CPU tensors and `more`, which replace those of the same name."""
    ninja.build("for the library", cached_compiler(), units() | more, folder, library)
    return folder / LIBRARY


class Build(build_ext):
    """Builds the library in build/, which stays, so that a second build is quick."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def run(self) -> None:
        in_place = bool(self.inplace or self.editable_mode)  # before setuptools clears it
        folders = [Path(self.get_finalized_command("build_py").build_lib)]
        folders += [ROOT] if in_place else []
        drop(folders, "_C.*so")  # extension modules of earlier versions, which hide _C.py
        try:
            if reason := missing():
                raise SystemExit(reason)
            super().run()
        except (Exception, SystemExit) as error:
            drop(folders, LIBRARY)  # that of an earlier build no longer matches the sources
            sys.exit(f"clinattn: {error}\n{REMEDY}")

    def build_extension(self, ext: Extension) -> None:
        built = build_library(ROOT / "build" / self.plat_name)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))


def drop(folders: list[Path], pattern: str) -> None:
    for folder in folders:
        for path in folder.glob(f"clinattn/{pattern}"):
            path.unlink()


class Wheel(bdist_wheel):
    """Names the wheel for the platform alone: the library knows nothing of Python's versions."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform
