"""The table of cases of the tests, and the problems that check a case: all lie in tests/lib."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from cases import CASES, FEATURES, Case
from summaries import REDUCTIONS, SummaryProblem
from support import Problem

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bf16  # noqa: F401

# The cases that show most, for stages that have no time for all
FIRST = (
    "one-query dim40 dim128 causal-gqa lengths-gqa mask-bool-b11k mask-float-bhqk "
    "packed-empty-sequences packed-window everything everything-packed dim256"
).split()

__all__ = ["CASES", "FEATURES", "FIRST", "REDUCTIONS", "Case", "Problem", "SummaryProblem"]
