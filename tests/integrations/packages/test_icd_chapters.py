"""The program that fine-tunes MiniLM on titles of ICD-10-CM, on a few titles for a few steps."""

import re
import subprocess
import sys

import pytest
from places import ROOT

for package in ("simple_icd_10_cm", "sklearn", "tokenizers", "safetensors"):
    pytest.importorskip(package)

PROGRAM = ROOT / "bench" / "models" / "icd_chapters.py"


def test_both_ways_are_scored_on_blocks_that_neither_has_read():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--titles", "40", "--steps", "25"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (baseline,) = re.findall(r"TF-IDF with logistic regression: accuracy ([\d.]+)", done.stdout)
    losses = [float(x) for x in re.findall(r"held-out loss ([\d.]+)", done.stdout)]
    assert float(baseline) > 0.1 and losses[-1] < losses[0], done.stdout
    assert len(PROGRAM.read_text().splitlines()) <= 60
