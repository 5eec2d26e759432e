"""AddressSanitizer and UndefinedBehaviorSanitizer over random calls of every instruction set.

    python tests/lib/sanitize.py [--calls 20000] [--seed 0] [--first 0]

Builds libclinattn.so with both in build/sanitize, which stays; sets that this machine lacks run on
emulated instructions. Inputs lie between guard pages, for what the sanitizers do not see. Prints
the seed, progress, and the call that fails, with the command that makes it alone. Exit code 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from building import extension
from module_builds import EMULATED, build, compiler_file
from places import LIB, ROOT

from clinattn.backends.compiled import compiled_module

CALLS = 20_000
SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
# vptr needs the type information of torch's classes, which torch does not give.
FLAGS = (*SANITIZERS, "-fno-sanitize=vptr", "-O1", "-g1", "-fno-omit-frame-pointer")
OPTIONS = {
    # Python and torch hold memory until the end of the process.
    # Fresh memory is NaN: max_malloc_fill_size is how much of it.
    "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=64:malloc_fill_byte=255"
    ":max_malloc_fill_size=1000000000",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
SHOWN_EVERY = 60.0  # seconds


def cannot() -> str | None:
    """Names what the build needs and this machine lacks."""
    if reason := extension.missing():
        return reason
    if compiler_file("libasan.so") is None:
        return "the compiler has no libasan.so: GCC's sanitizers are used (CXX=g++)"
    return None


def emulated() -> tuple[str, ...]:
    """The sets to emulate: none where the machine has all, or cannot run what emulates them."""
    module = compiled_module()
    here = module.instruction_sets() if module else []
    return EMULATED if "avx2" in here and not set(EMULATED) <= set(here) else ()


def run_calls(seed: int, first: int, calls: int, *options: str, **settings: str) -> str | None:
    """Make the calls in a process of their own; returns the one that ended it, if any."""
    command = [sys.executable, str(LIB / "random_calls.py"), *options]
    command += ["--seed", str(seed), "--first", str(first), "--calls", str(calls)]
    path = [str(LIB), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **settings}
    call, began = "none: it did not start", time.monotonic()
    shown = began
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for made, line in enumerate(process.stdout):
            call = line.strip()
            if time.monotonic() - shown > SHOWN_EVERY:
                shown = time.monotonic()
                print(f"{made} of {calls} calls, {shown - began:.0f} s", flush=True)
    return None if process.returncode == 0 else call


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls under sanitizers.")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"how many (default {CALLS})")
    parser.add_argument("--seed", type=int, default=0, help="what all calls follow from")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    asked = parser.parse_args()
    if reason := cannot():
        print(f"cannot sanitize: {reason}", file=sys.stderr)
        return 1
    sets = emulated()
    print(f"building in build/sanitize, emulated: {' '.join(sets) or 'nothing'}", flush=True)
    module = build(ROOT / "build" / "sanitize", sets, FLAGS)
    print(f"{asked.calls} calls from {asked.first}, seed {asked.seed}", flush=True)
    # The first library is looked up for C++ exceptions, which Python itself does not bring.
    libraries = [compiler_file("libasan.so"), compiler_file("libstdc++.so")]
    preload = " ".join(str(x) for x in libraries if x)
    options = ("--module", str(module))
    call = run_calls(asked.seed, asked.first, asked.calls, *options, LD_PRELOAD=preload, **OPTIONS)
    if call is None:
        print("nothing found")
        return 0
    number = call.split()[0]
    print(f"failed: {call}\nalone: make sanitize SEED={asked.seed} FIRST={number} CALLS=1")
    return 1


if __name__ == "__main__":
    sys.exit(main())
