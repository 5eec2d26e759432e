"""Builds clinattn._C, the compiled CPU backend, when torch, a C++ compiler and ninja are at hand.

Without one of them the install succeeds all the same and the reference backend serves; the Makefile
stops instead. The module also gets the CUDA kernels where torch is a CUDA build and nvcc is found.
CLINATTN_FORCE_BUILD=1 makes a failed build an error, CLINATTN_SKIP_EXT=1 leaves the extension out,
CLINATTN_CUDA=0 leaves out the CUDA kernels, CLINATTN_CUDA=1 makes their absence an error,
TORCH_CUDA_ARCH_LIST names their cards, CXX the compiler, MAX_JOBS limits its processes.
"""

from __future__ import annotations

import copy
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
FORCED_BY = [x for x in ("CLINATTN_FORCE_BUILD", "CLINATTN_CUDA") if os.environ.get(x) == "1"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {"scalar": [], "avx2": AVX2, "avx512": AVX512, "amx": AMX}

COMMON_FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
# A contraction that the compiler chooses would differ between instruction sets and versions.
ISA_COMMON_FLAGS = [*COMMON_FLAGS, "-std=c++20", "-ffp-contract=off", "-fno-exceptions"]
ISA_COMMON_FLAGS += ["-Wall", "-Wextra"]
# GCC 12 warns of its own AVX headers (PR 105593); Clang does not, and knows one of the two.
GCC_FLAGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"

NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-I{ROOT / CSRC}"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
# Where neither TORCH_CUDA_ARCH_LIST nor a card says which.
CUDA_ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0")
OLDEST_CUDA_ARCH = (7, 5)


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def compiler_version() -> str:
    command = [*compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def is_clang() -> bool:
    return "clang" in compiler_version()


def isa_common_flags() -> list[str]:
    """Flags that every unit of an instruction set is compiled with."""
    return [*ISA_COMMON_FLAGS, *([] if is_clang() else GCC_FLAGS)]


def accepts(flags: list[str]) -> bool:
    """Whether the compiler knows these flags: an older one may lack AMX and serve the rest."""
    return complaint("", [*flags, "-fsyntax-only"]) is None


def complaint(program: str, flags: list[str]) -> str | None:
    """The compiler's message for a program that it refuses; None for one that it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler(), *flags, "-x", "c++", "-", "-o", str(Path(folder) / "program")]
        try:
            done = subprocess.run(command, input=program, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit {done.returncode}"


def openmp_flags() -> list[str]:
    """Flags under which at::parallel_for uses threads; none, with a message, without OpenMP."""
    if complaint(OPENMP_PROGRAM, ["-fopenmp"]) is None:
        return ["-fopenmp"]
    need = "libomp and its headers (on Debian: libomp-dev)" if is_clang() else "omp.h and libgomp"
    print(
        f"clinattn: the CPU kernels will use one thread: {shlex.join(compiler())} -fopenmp needs "
        f"{need}",
        file=sys.stderr,
    )
    return []


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
    if refusal := complaint("int main() {}", ["-std=c++20"]):
        return f"{shlex.join(compiler())} compiles no program in C++20: {refusal}"
    return None


def give_up(reason: str) -> None:
    if FORCED_BY:
        sys.exit(
            f"clinattn: {FORCED_BY[0]}=1, but the compiled backend failed: {reason}\n"
            "clinattn: CLINATTN_SKIP_EXT=1 goes on without it, on the slow reference backend"
        )
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
    flags = {name: [*isa_common_flags(), *ISA_FLAGS[name], f"-I{ROOT / CSRC}"] for name in units}
    named = {f"isa_{name}": (path, flags[name]) for name, path in units.items()}
    return ninja_objects(compiler(), named, folder)


def ninja_objects(
    command: list[str], units: dict[str, tuple[Path, list[str]]], folder: Path
) -> list[str]:
    """Compile each source with its flags, to an object of its name."""
    lines = [
        f"compiler = {shlex.join(command)}",
        "rule compile",
        "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
        "  description = $out $flags",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for name, (path, flags) in units.items():
        source = str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines += [f"build {name}.o: compile {source}", f"  flags = {shlex.join(flags)}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run(["ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)
    return [str(folder / f"{name}.o") for name in units]


def nvcc() -> str | None:
    """The CUDA compiler, of CUDA_HOME or on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None
    return inside or shutil.which("nvcc")


def nvcc_says(*options: str) -> str:
    command = [nvcc() or "nvcc", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def cuda_missing() -> str | None:
    """What stands between this machine and the CUDA kernels, in words."""
    import torch

    if os.environ.get("CLINATTN_CUDA") == "0":
        return "CLINATTN_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if nvcc() is None:
        return (
            "nvcc is neither on PATH nor in CUDA_HOME; "
            f"install the CUDA toolkit {torch.version.cuda}, as of torch"
        )
    release = re.search(r"release (\d+)\.\d+", nvcc_says("--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "of unknown release"
        return f"nvcc is {found}, and torch is built with CUDA {torch.version.cuda}"
    if not cuda_archs():
        return "TORCH_CUDA_ARCH_LIST or the cards here are all older than compute capability 7.5"
    return None


def cuda_archs() -> list[str]:
    """What to compile for, as "8.0", or "9.0+PTX" for later cards, too.

    TORCH_CUDA_ARCH_LIST says it, in torch's notation, or the cards that are visible.
    """
    import torch
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") in ("", "native"):
        if torch.cuda.device_count() == 0:
            known = nvcc_says("--list-gpu-arch")
            archs = [x for x in CUDA_ARCHS if f"compute_{x.replace('.', '')}\n" in known]
            return [*archs[:-1], f"{archs[-1]}+PTX"] if archs else []
    with_ptx: dict[tuple[int, int], bool] = {}
    for major, minor, kind in re.findall(
        r"compute_(\d+)(\d)a?,code=(sm|compute)", " ".join(_get_cuda_arch_flags())
    ):
        arch = int(major), int(minor)
        with_ptx[arch] = with_ptx.get(arch, False) or kind == "compute"
    usable = sorted(arch for arch in with_ptx if arch >= OLDEST_CUDA_ARCH)
    return [f"{major}.{minor}" + "+PTX" * with_ptx[major, minor] for major, minor in usable]


def gencode(arch: str) -> list[str]:
    """nvcc's flags for "8.0" or "9.0+PTX"."""
    number, _, ptx = arch.replace(".", "").partition("+")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    return flags + [f"-gencode=arch=compute_{number},code=compute_{number}"] * bool(ptx)


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels; ends the build where they are forced and cannot be had."""
    import torch

    asked = os.environ.get("CLINATTN_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"clinattn: CLINATTN_CUDA is {asked!r}; expected 0 or 1")
    reason = cuda_missing()
    if reason and asked == "1":
        sys.exit(f"clinattn: CLINATTN_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    if reason and torch.version.cuda is not None:
        print(f"clinattn: building without the CUDA kernels: {reason}", file=sys.stderr)
    return reason is None


def add_cuda(ext: Extension, folder: Path) -> None:
    """The CUDA kernels, compiled by nvcc alone, and their torch side, compiled as the rest."""
    archs = cuda_archs()
    flags = [*NVCC_FLAGS, *(flag for arch in archs for flag in gencode(arch))]
    units = {path.stem: (path, flags) for path in sorted((CSRC / "cuda").glob("*.cu"))}
    ext.extra_objects += ninja_objects([nvcc() or "nvcc"], units, folder)
    ext.sources += map(str, sorted((CSRC / "cuda").glob("*.cpp")))
    # What nvcc itself uses; the folder above it can be another.
    used = nvcc_says("--dryrun", "-x", "cu", os.devnull)
    ext.include_dirs += dict.fromkeys(re.findall(r'"-I([^"]+)"', used))
    ext.library_dirs += dict.fromkeys(re.findall(r'"-L([^"]+)"', used))
    ext.libraries += ["c10_cuda", "torch_cuda", "cudart"]
    archs_flag = f"-DCLINATTN_CUDA_ARCHS={','.join(archs)}"
    ext.extra_compile_args += ["-DCLINATTN_HAVE_CUDA", archs_flag]


def extension() -> dict:
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
            """What an earlier build left does not match the sources any more."""
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
            """What fails there costs the CUDA kernels alone, unless they are forced."""
            ext.optional = False
            self.extensions = [ext]
            try:
                add_cuda(ext, Path(self.build_temp) / "cuda")
                super().build_extensions()
            except Exception as error:
                if FORCED_BY:
                    raise
                print(f"clinattn: building without the CUDA kernels: {error}", file=sys.stderr)
                return False
            return True

    sources = [path for path in CSRC.rglob("*.cpp") if not path.stem.startswith("isa_")]
    sources = [path for path in sources if path.parent != CSRC / "cuda"]
    module = CppExtension(
        "clinattn._C",
        sorted(map(str, sources)),
        include_dirs=[str(ROOT / CSRC)],
        extra_compile_args=[*COMMON_FLAGS, *openmp]
        + [f"-DCLINATTN_HAVE_{name.upper()}" for name in units],
        extra_link_args=link_openmp,
        depends=[str(path) for path in sorted(CSRC.rglob("*.[ch]*"))],
        optional=not FORCED_BY,
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


if __name__ == "__main__":
    # ninja may live in the virtual environment, which pip does not put on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.chdir(ROOT)
    setup(
        # kernels/ at the root is installed as clinattn.kernels and as nothing else: a top-level
        # module `kernels` would stand in the way of the package of that name.
        packages=sorted({"clinattn", *find_packages(include=["clinattn.*"]), "clinattn.kernels"}),
        package_dir={"clinattn.kernels": "kernels"},
        **extensions(),
    )
