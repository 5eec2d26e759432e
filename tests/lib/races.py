"""Races between the warps of the CUDA kernels, found by ThreadSanitizer in the emulator.

    found = races("causal packed".split(), torch.float16, capability=80)

csrc/witness.h tells ThreadSanitizer what a barrier orders. It sees a pair of accesses that no
barrier orders also where they happen in the right order. The emulator runs warps in one order, so a
result is kept for as long as the C++ and what draws the inputs are the same.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import torch
from building import toolchain
from kept import cache_folder, digest, kept
from places import LIB, ROOT

# Calls and returns are not told: lanes jump from one stack to another.
FLAGS = ("-O1", "-g1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
# Python and torch are not compiled so, and their locks are unknown.
OPTIONS = "ignore_noninstrumented_modules=1 exitcode=66"
RACE = "SUMMARY: ThreadSanitizer: "
SUMMARIES = ("received", "relevance", "entropy", "topk")  # one for each kernel


@functools.cache
def runtime() -> Path | None:
    """GCC's library of ThreadSanitizer; None where the compiler is another, or has none."""
    compiler = toolchain.compiler()
    if shutil.which(compiler[0]) is None or toolchain.is_clang():
        return None
    asked = [*compiler, "-print-file-name=libtsan.so"]
    path = Path(subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def missing() -> str | None:
    """Names what these tests need and this machine lacks; None if it has all."""
    if reason := emulated.missing():
        return reason
    return None if runtime() else f"{toolchain.compiler()[0]} has no ThreadSanitizer with fibers"


def at_fixed_addresses(command: list[str]) -> list[str]:
    """ThreadSanitizer expects programs where Linux put them before it spread them further."""
    program = shutil.which("setarch")
    return [program, "-R", *command] if program else command


def races(cases: list[str], dtype: torch.dtype, capability: int) -> list[str]:
    """Returns the races that ThreadSanitizer finds in the passes and summaries of the cases.

    They are kept in the cache.

    Raises RuntimeError for a process that ends in another way.
    """
    name = f"{digest(words=cases)}-{str(dtype).removeprefix('torch.')}-{capability}"
    make = lambda: found_races(cases, dtype, capability)
    return kept(cache_folder("races"), name, key(), make)


@functools.cache
def key() -> str:
    """Returns a digest of everything that a kept result depends on."""
    folders = (ROOT / "csrc", ROOT / "csrc" / "cuda", LIB / "csrc")
    suffixes = (".h", ".cuh", ".cu", ".cpp")
    sources = [x for folder in folders for x in folder.glob("*") if x.suffix in suffixes]
    names = ("cases", "drawn", "support", "summaries", "emulated", "races")
    drawn = [LIB / f"{name}.py" for name in names]
    words = [*FLAGS, OPTIONS, toolchain.compiler_version(), torch.__version__]
    return digest(*sorted(sources), *drawn, words=words)


def found_races(cases: list[str], dtype: torch.dtype, capability: int) -> list[str]:
    """Runs the cases one by one in a process."""
    library = emulated.build(ROOT / "build" / "emulated-races", more=FLAGS)
    settings = {
        "LD_PRELOAD": str(runtime()),
        "TSAN_OPTIONS": OPTIONS,
        "OMP_NUM_THREADS": "1",
        emulated.CAPABILITY: str(capability),
    }
    command = [sys.executable, __file__, str(library), str(dtype).removeprefix("torch."), *cases]
    done = subprocess.run(
        at_fixed_addresses(command), env=os.environ | settings, capture_output=True, text=True
    )
    found = [x.removeprefix(RACE) for x in done.stderr.splitlines() if x.startswith(RACE)]
    if done.returncode not in (0, 66) or (done.returncode == 66) != bool(found):
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-3000:]}")
    assert done.stdout.split() == cases, done.stdout
    return found


def run(library: str, dtype: str, names: list[str]) -> None:
    emulated.stand_in(Path(library))
    from cases import CASES, FEATURES
    from summaries import SummaryProblem
    from support import Problem

    by_name = {case.id: case for case in (*CASES, *FEATURES)}
    for name in names:
        case, kind = by_name[name], getattr(torch, dtype)
        Problem(case, kind).run("cuda")
        if case.dropout is None:
            problem = SummaryProblem(case, kind)
            for reduce in SUMMARIES:
                problem.summary(reduce, "cuda")
        print(name, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(LIB))
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
