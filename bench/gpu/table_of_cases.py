"""The table of cases of the tests, and the problem that checks a case: both lie in tests/lib."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from cases import CASES, FEATURES, Case
from support import Problem

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bf16  # noqa: F401

__all__ = ["CASES", "FEATURES", "Case", "Problem"]
