"""Runs interpreted_triton.py, whose docstring says why it needs processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARDS = 2
RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def shards():
    """All shards at once, in processes of one thread each."""
    folder = Path(__file__).parent
    options = ["-q", "-x", "--tb=short", "--durations=5", "-p", "no:cacheprovider"]
    children = []
    for shard in range(SHARDS):
        settings = {
            "TRITON_INTERPRET": "1",
            "CLINATTN_TEST_SHARD": f"{shard}/{SHARDS}",
            "OMP_NUM_THREADS": "1",
        }
        child = subprocess.Popen(
            [sys.executable, "-c", RUN, "interpreted_triton.py", *options],
            cwd=folder,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        children.append(child)
    yield children
    for child in children:
        child.kill()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_in_the_interpreter(shard, shards):
    output, _ = shards[shard].communicate()
    assert shards[shard].returncode == 0, f"shard {shard} of {SHARDS} failed:\n{output}"
