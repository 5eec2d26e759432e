"""Flags of the C++ compiler and of nvcc."""

from __future__ import annotations

from pathlib import Path

from build_support.folders import CSRC
from build_support.toolchain import is_clang
from build_support.torch_here import torch_folder

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {
    "scalar": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": AMX,
}

COMMON_FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
# A contraction that the compiler chooses would differ between instruction sets and versions.
ISA_COMMON_FLAGS = [*COMMON_FLAGS, "-std=c++20", "-ffp-contract=off", "-fno-exceptions"]
ISA_COMMON_FLAGS += ["-Wall", "-Wextra"]
# A loop keeps its place in a cache line whatever is linked before it; 16 bytes off cost bf16 2 %.
ISA_COMMON_FLAGS += ["-falign-functions=64"]
# GCC 12 warns of its own AVX headers (PR 105593); Clang does not, and knows one of the two.
GCC_FLAGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# The part of torch's stable ABI that torch 2.11 has: what is built runs there and in what follows.
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"
TORCH_COMMON_FLAGS = [*COMMON_FLAGS, "-std=c++20", OLDEST_TORCH, f"-I{CSRC}"]

NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


def isa_common_flags() -> list[str]:
    """Flags that every unit of an instruction set is compiled with."""
    return [*ISA_COMMON_FLAGS, *([] if is_clang() else GCC_FLAGS)]


def torch_flags() -> list[str]:
    """Flags of the files that include torch."""
    return [*TORCH_COMMON_FLAGS, f"-isystem{found_torch() / 'include'}"]


def link_flags(*names: str) -> list[str]:
    """Flags that link a library to those of torch, which `import torch` has loaded before it."""
    return [f"-L{found_torch() / 'lib'}", *(f"-l{name}" for name in ("torch_cpu", *names))]


def found_torch() -> Path:
    """The folder of torch. Raises FileNotFoundError without torch."""
    folder = torch_folder()
    if folder is None:
        raise FileNotFoundError("torch is not installed")
    return folder
