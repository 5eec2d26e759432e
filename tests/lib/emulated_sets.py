"""The compiled CPU backend with AVX-512, AVX512-BF16 and AMX emulated, where AVX2 alone is there.

    PYTHONPATH=tests/lib pytest -p emulated_sets tests/cpu/test_instruction_sets.py

Once imported, clinattn._C is over that library: the kernels of these sets are compiled with
tests/lib/csrc/emulated_*.h. Numbers are those of the instructions; time is not.
"""

from __future__ import annotations

import sys

from building import extension
from module_builds import EMULATED, ROOT, build, load

FOLDER = ROOT / "build" / "emulated_sets"

if __name__ == "__main__":
    if reason := extension.missing():
        sys.exit(f"cannot build: {reason}")
    print(build(FOLDER, EMULATED))
else:
    load(build(FOLDER, EMULATED))
