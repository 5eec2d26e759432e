"""The compiled CPU backend with AVX-512 and AMX emulated, for a machine that has AVX2 alone.

    PYTHONPATH=tests/lib pytest -p emulated_sets tests/cpu/test_instruction_sets.py

Once imported, clinattn._C is that module: csrc/emulated_*.h are what the kernels of both sets
are compiled with. Numbers are those of the instructions; time is not.
"""

from __future__ import annotations

import sys

from module_builds import EMULATED, ROOT, build, load, missing

FOLDER = ROOT / "build" / "emulated_sets"

if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"cannot build: {reason}")
    print(build(FOLDER, EMULATED))
else:
    load(build(FOLDER, EMULATED))
