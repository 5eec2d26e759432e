"""The extension clinattn._C as setuptools builds it, or the reason why it is left out."""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension

from build_support import ninja
from build_support.cuda import add_cuda, wants_cuda
from build_support.flags import COMMON_FLAGS, ISA_FLAGS, isa_common_flags, openmp_flags
from build_support.folders import CSRC, ROOT
from build_support.sources import isa_units, torch_sources
from build_support.toolchain import cached_compiler, compiler, complaint, is_clang


def extensions() -> dict[str, Any]:
    """Returns setup()'s arguments for the extension; none, with a message, if it is left out."""
    if os.environ.get("CLINATTN_SKIP_EXT") == "1":
        return {}
    reason = missing()
    if reason is None:
        return extension()
    give_up(reason)
    return {}


def missing() -> str | None:
    """Returns the reason why the compiled backend cannot be built here, or None."""
    if not (CSRC / "module.cpp").exists():
        return "the C++ sources are not part of this tree"
    try:
        import torch.utils.cpp_extension  # noqa: F401
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


def isa_objects(units: dict[str, Path], folder: Path) -> list[str]:
    """Compile each unit with the flags of its own instruction set, and without torch's headers.

    setuptools has one set of flags for all the sources of an extension, hence a ninja file of ours.
    """
    flags = {name: [*isa_common_flags(), *ISA_FLAGS[name], f"-I{CSRC}"] for name in units}
    named = {f"isa_{name}": ninja.Unit(path, flags[name]) for name, path in units.items()}
    return ninja.build("for cpu", cached_compiler(), named, folder)


def extension() -> dict[str, Any]:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    units = isa_units()
    with_cuda = wants_cuda()
    # GCC's calls are left to the runtime that torch brings, so that there is one pool of threads in
    # the process; Clang's have another name and library.
    openmp = openmp_flags()
    link_openmp = openmp if is_clang() else []

    class Build(BuildExtension):
        extensions: list[Extension]

        def finalize_options(self) -> None:
            super().finalize_options()
            # pip builds in a folder that it throws away; one that stays makes a rebuild quick.
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = str(ROOT / "build" / tag)

        def run(self) -> None:
            in_place = bool(self.inplace or self.editable_mode)  # before setuptools clears it
            try:
                super().run()
            except (Exception, SystemExit) as error:
                self.drop_older_builds(in_place)
                give_up(f"the build stopped: {error}")

        def drop_older_builds(self, in_place: bool) -> None:
            """Deletes modules of earlier builds, which no longer match the sources."""
            for folder in [Path(self.build_lib), *([ROOT] if in_place else [])]:
                for path in folder.glob("clinattn/_C.*"):
                    path.unlink()

        def build_extensions(self) -> None:
            (ext,) = self.extensions
            # Free of torch and Python, they are the same for all of them.
            ext.extra_objects = isa_objects(units, ROOT / "build" / self.plat_name / "isa")
            if not (with_cuda and self.built_with_cuda(copy.deepcopy(ext))):
                self.extensions = [ext]
                super().build_extensions()

        def built_with_cuda(self, ext: Extension) -> bool:
            """Builds with the CUDA kernels; a failure leaves out these alone, unless forced."""
            ext.optional = False
            self.extensions = [ext]
            try:
                add_cuda(ext, Path(self.build_temp) / "cuda")
                super().build_extensions()
            except Exception as error:
                if forced_by():
                    raise
                print(f"clinattn: building without the CUDA kernels: {error}", file=sys.stderr)
                return False
            return True

        def build_extension(self, ext: Extension) -> None:
            self.compiler.compile = self.compile_torch_side
            super().build_extension(ext)

        def compile_torch_side(
            self,
            sources: list[str],
            output_dir: str,
            macros: Any = None,
            include_dirs: Any = None,
            debug: bool = False,
            extra_preargs: Any = None,
            extra_postargs: Any = None,
            depends: Any = None,
        ) -> list[str]:
            """Compiles with torch's flags, but without torch's log of every command."""
            _, _, last, preprocessor, _ = self.compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            first = self.compiler._get_cc_args(preprocessor, debug, extra_preargs)
            flags = [*self.compiler.compiler_so[1:], *first, *last]
            named = {os.path.splitext(x)[0]: ninja.Unit(ROOT / x, flags) for x in sources}
            title = f"for torch {torch.__version__}"
            return ninja.build(title, cached_compiler(), named, Path(output_dir))

    module = CppExtension(
        "clinattn._C",
        [str(path.relative_to(ROOT)) for path in torch_sources()],
        include_dirs=[str(CSRC)],
        extra_compile_args=[*COMMON_FLAGS, "-std=c++20", *openmp]
        + [f"-DCLINATTN_HAVE_{name.upper()}" for name in units],
        extra_link_args=link_openmp,
        depends=sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.[ch]*")),
        optional=forced_by() is None,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}
