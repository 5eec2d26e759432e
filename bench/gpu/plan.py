"""Prints two command lines for a GPU that is at hand for minutes, with the seconds of each stage.

    python bench/gpu/plan.py

Both lines run on a plain copy of this tree that holds build/gpu-pack, where python3 has torch,
Triton, numpy and pyarrow: nothing is installed and nothing compiled. The second line goes on with
the rows of the first, which have to be in $OUT, or in bench/results, then.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Seconds of each stage on 16 cores with kernels compiled ahead of time: on an H100, 2026-11-28.
CALLS = {
    "A": {
        "build": 10, "ceilings": 2, "numerics": 55, "bits": 40, "speed": 65, "encoder": 48,
        "clinical": 70, "overhead": 5, "memory": 1, "targets": 1,
    },
    "B": {
        "shapes": 15, "race": 65, "summaries": 30, "capture": 12, "sync": 1, "numerics_rest": 65,
        "sanitizer": 120, "profile": 75, "targets": 1, "verification": 1,
    },
}  # fmt: skip
START = 15  # of Python, twice: the process that starts the others, and theirs
MARGIN = 1.1


def seconds(call: str) -> int:
    return START + sum(CALLS[call].values())


def command(call: str, commit: str) -> str:
    """Command line for the root of the tree; rows and logs go to $OUT, if set."""
    budget = round(MARGIN * seconds(call))
    rows = "" if call == "A" else '--append "$(ls -t ${OUT:-bench/results}/gpu-*.jsonl | head -1)" '
    return (
        f"ln -sfn ../kernels clinattn/kernels; PYTHONPATH=$PWD PYTHONUNBUFFERED=1 "
        f"CLINATTN_GPU_BUDGET={budget} python3 bench/gpu/run.py --commit {commit} {rows}"
        + " ".join(CALLS[call])
    )


def main() -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    for call, stages in CALLS.items():
        print(f"{call}: {seconds(call)} s expected, {round(MARGIN * seconds(call))} s at most")
        print("  " + "  ".join(f"{stage} {s}" for stage, s in stages.items()))
        print(f"  {command(call, commit)}\n")


if __name__ == "__main__":
    main()
