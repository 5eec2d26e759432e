"""AVX-512 and AMX on a machine that lacks AMX: tests of both sets, on emulated instructions."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clinattn

TESTS = Path(__file__).parent
_C = importlib.import_module("clinattn._C") if clinattn.backends()["cpu"] else None
SELECTED = {
    "test_sizes.py": "amx",
    "test_extremes.py": "amx or avx512",
    "test_float32_precision.py": "cpu",
    "test_linear.py": "",
    "test_linear_ranges.py": "",
    "test_instruction_sets.py": "(amx or avx512) and test_across_tiles"
    " and (short-softcap or short-dropout or short-lse or long-mask-grad-rows)",
}

pytestmark = [
    pytest.mark.skipif(_C is None, reason="the compiled backend is not built here"),
    pytest.mark.skipif(
        _C is not None and "amx" in _C.instruction_sets(), reason="this machine has AMX itself"
    ),
]


def run(*arguments):
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def built():
    done = run(str(TESTS / "emulated_sets.py"))
    if done.stderr.startswith("cannot build: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SELECTED)
def test_on_emulated_instructions(name, built):
    done = run("-m", "pytest", "-q", "-p", "emulated_sets", f"tests/{name}", "-k", SELECTED[name])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
