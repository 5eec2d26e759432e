"""Measurements on a GPU: run.py and the stages that it performs.

    run.py            the command behind `make gpu`: the order of the stages and their budgets
    pack.py           `make gpu-pack`: what the stages launch, compiled on a machine without a GPU
    plan.py adopt.py plot.py    what is typed before a run, and what becomes of its rows

A stage is a function of the class Run in rows.py, and imports no other stage. Only run.py and
launches.py, the list of kernels that stages launch, import stages; nothing imports run.py.
"""

import os
import sys
from pathlib import Path

# A library that build.py makes in a dry run: its kernels are backend "cuda" in later processes.
EMULATED = "CLINATTN_GPU_EMULATED"


def stand_in() -> None:
    """Makes the library that EMULATED names, if it does, backend "cuda" of this process."""
    if EMULATED in os.environ:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
        import emulated

        emulated.stand_in(Path(os.environ[EMULATED]))


stand_in()
