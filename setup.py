"""Builds clinattn._C, the compiled CPU backend, when torch, a C++ compiler and ninja are at hand.

Without one of them the install succeeds all the same and the reference backend serves.
CLINATTN_FORCE_BUILD=1 makes a failed build an error, CLINATTN_SKIP_EXT=1 leaves the extension out,
CXX names the compiler, MAX_JOBS limits its processes.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
FORCE = os.environ.get("CLINATTN_FORCE_BUILD") == "1"

# ninja may live in the virtual environment, which pip does not put on PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.chdir(ROOT)

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {"scalar": [], "avx2": AVX2, "avx512": AVX512, "amx": AMX}

COMMON_FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
# A contraction that the compiler chooses would differ between instruction sets and versions.
ISA_COMMON_FLAGS = [*COMMON_FLAGS, "-std=c++20", "-ffp-contract=off", "-fno-exceptions"]
ISA_COMMON_FLAGS += ["-Wall", "-Wextra"]
# GCC 12 warns of its own AVX headers (PR 105593).
ISA_COMMON_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def compiler_version() -> str:
    command = [*compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def accepts(flags: list[str]) -> bool:
    """Whether the compiler knows these flags: an older one may lack AMX and serve the rest."""
    command = [*compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def missing() -> str | None:
    """What stands between this machine and the compiled backend, in words."""
    if not (CSRC / "module.cpp").exists():
        return "the C++ sources are not part of this tree"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:  # a broken torch raises all kinds
        return f"torch cannot be imported ({error}); install it first, then --no-build-isolation"
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler: {compiler()[0]!r} is not on PATH (install g++ or set CXX)"
    if shutil.which("ninja") is None:
        return "ninja is not on PATH (pip install ninja)"
    return None


def give_up(reason: str) -> None:
    if FORCE:
        sys.exit(f"clinattn: CLINATTN_FORCE_BUILD=1, but the compiled backend failed: {reason}")
    print(f"clinattn: installing without the compiled CPU backend: {reason}", file=sys.stderr)


def isa_units() -> dict[str, Path]:
    """The instruction-set units that this machine's architecture and compiler can build."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = [name for name in (ISA_FLAGS if x86 else ["scalar"]) if accepts(ISA_FLAGS[name])]
    units = {name: CSRC / "cpu" / f"isa_{name}.cpp" for name in names}
    return {name: path for name, path in units.items() if path.exists()}


def isa_objects(units: dict[str, Path], folder: Path) -> list[str]:
    """Compile each unit with the flags of its own instruction set, and without torch's headers.

    setuptools has one set of flags for all the sources of an extension, hence a ninja file of ours.
    """
    lines = [
        f"cxx = {shlex.join(compiler())}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  description = $out $flags",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for name, path in units.items():
        source = str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        flags = shlex.join([*ISA_COMMON_FLAGS, *ISA_FLAGS[name], f"-I{ROOT / CSRC}"])
        lines += [f"build isa_{name}.o: cxx {source}", f"  flags = {flags}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run(["ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)
    return [str(folder / f"isa_{name}.o") for name in units]


def extension() -> dict:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    units = isa_units()
    # at::parallel_for is serial without it. GCC's calls are left to the runtime that torch brings,
    # so that there is one pool of threads in the process; Clang's have another name and library.
    openmp = ["-fopenmp"] if accepts(["-fopenmp"]) else []
    link_openmp = openmp if "clang" in compiler_version() else []

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # pip builds in a folder that it throws away; one that stays makes a rebuild quick.
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = str(ROOT / "build" / tag)

        def run(self) -> None:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                give_up(f"the build stopped: {error}")
                self.drop_older_builds()

        def drop_older_builds(self) -> None:
            """What an earlier build left does not match the sources any more."""
            in_place = self.inplace or self.editable_mode
            for folder in [Path(self.build_lib), *([ROOT] if in_place else [])]:
                for path in folder.glob("clinattn/_C.*"):
                    path.unlink()

        def build_extensions(self) -> None:
            for ext in self.extensions:
                ext.extra_objects = isa_objects(units, Path(self.build_temp) / "isa")
            super().build_extensions()

    sources = [path for path in CSRC.rglob("*.cpp") if not path.stem.startswith("isa_")]
    sources.remove(CSRC / "cuda" / "attention.cpp")
    module = CppExtension(
        "clinattn._C",
        sorted(map(str, sources)),
        include_dirs=[str(ROOT / CSRC)],
        extra_compile_args=[*COMMON_FLAGS, *openmp]
        + [f"-DCLINATTN_HAVE_{name.upper()}" for name in units],
        extra_link_args=link_openmp,
        depends=[str(path) for path in sorted(CSRC.rglob("*.[ch]*"))],
        optional=not FORCE,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def extensions() -> dict:
    if os.environ.get("CLINATTN_SKIP_EXT") == "1":
        return {}
    reason = missing()
    if reason is None:
        return extension()
    give_up(reason)
    return {}


setup(
    # kernels/ at the root is installed as clinattn.kernels and as nothing else: a top-level
    # module `kernels` would stand in the way of the package of that name.
    packages=sorted({"clinattn", *find_packages(include=["clinattn.*"]), "clinattn.kernels"}),
    package_dir={"clinattn.kernels": "kernels"},
    **extensions(),
)
