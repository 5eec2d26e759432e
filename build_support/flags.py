"""Flags of the C++ compiler and of nvcc."""

from __future__ import annotations

import shlex
import sys

from build_support.folders import CSRC
from build_support.toolchain import compiler, complaint, is_clang

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

NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


def isa_common_flags() -> list[str]:
    """Flags that every unit of an instruction set is compiled with."""
    return [*ISA_COMMON_FLAGS, *([] if is_clang() else GCC_FLAGS)]


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
