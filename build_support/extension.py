"""The library as setuptools builds it, or the reason why it is left out."""

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


def extensions() -> dict[str, Any]:
    """Returns setup()'s arguments for the library; none, with a message, if it is left out."""
    if os.environ.get("CLINATTN_SKIP_EXT") == "1":
        return {}
    reason = missing()
    if reason is None:
        # setuptools wants sources, and asks for files by them; build_library knows them.
        sources = [str(path.relative_to(ROOT)) for path in torch_sources()]
        library = Extension(f"clinattn.{LIBRARY.removesuffix('.so')}", sources)
        return {
            "ext_modules": [library],
            "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel},
        }
    give_up(reason)
    return {}


def missing() -> str | None:
    """Returns the reason why the compiled backend cannot be built here, or None."""
    if not (CSRC / "facts.cpp").exists():
        return "the C++ sources are not part of this tree"
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken torch raises all kinds
        return f"torch cannot be imported ({error}); install it first, then --no-build-isolation"
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler: {compiler()[0]!r} is not on PATH (install g++ or set CXX)"
    if ninja.program() is None:
        return "ninja is not on PATH (pip install ninja)"
    if refusal := complaint("int main() {}", ["-std=c++20"]):
        return f"{shlex.join(compiler())} compiles no program in C++20: {refusal}"
    return None


def forced_by() -> str | None:
    """The environment variable that makes a failed build an error."""
    names = ("CLINATTN_FORCE_BUILD", "CLINATTN_CUDA")
    return next((name for name in names if os.environ.get(name) == "1"), None)


def give_up(reason: str) -> None:
    if forced := forced_by():
        sys.exit(
            f"clinattn: {forced}=1, but the compiled backend failed: {reason}\n"
            "clinattn: CLINATTN_SKIP_EXT=1 goes on without it, on the slow reference backend"
        )
    print(f"clinattn: installing without the compiled CPU backend: {reason}", file=sys.stderr)


def build_library(folder: Path) -> Path:
    """Brings the library in a folder up to date, with the CUDA kernels where they can be built."""
    if wants_cuda():
        try:
            return link(folder, *cuda_parts(folder / "cuda"))
        except Exception as error:
            if forced_by():
                raise
            print(f"clinattn: building without the CUDA kernels: {error}", file=sys.stderr)
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
            super().run()
        except (Exception, SystemExit) as error:
            drop(folders, LIBRARY)  # that of an earlier build no longer matches the sources
            give_up(f"the build stopped: {error}")

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
