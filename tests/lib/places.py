"""Folders of the repository."""

from pathlib import Path

LIB = Path(__file__).resolve().parent
TESTS = LIB.parent
ROOT = TESTS.parent
BENCH = ROOT / "bench"
