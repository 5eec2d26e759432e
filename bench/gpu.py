"""Everything a GPU can tell about the Triton kernels, in one command of under ten minutes.

    python bench/gpu.py                        numerics, races, speed, memory, tile sweep
    python bench/gpu.py numerics race          these stages alone
    CLINATTN_GPU_DRYRUN=1 python bench/gpu.py  all of it in Triton's interpreter, tiny, no GPU

Rows go to bench/results/gpu-<card>-<date>.jsonl, or to $OUT; the first one says where and with what
they were taken. A failure is a row too: the rest goes on, and the exit code tells at the end.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRYRUN = os.environ.get("CLINATTN_GPU_DRYRUN") == "1"
if DRYRUN:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import gpu_numerics  # noqa: E402
import gpu_speed  # noqa: E402
import torch  # noqa: E402

from clinattn.environment import environment  # noqa: E402

BUDGET = float(os.environ.get("CLINATTN_GPU_BUDGET", "570"))  # seconds
DEVICE = torch.device("cpu" if DRYRUN else "cuda")

# A stage is called as stage(run) and gives its results to run.row(...).
STAGES: dict[str, Callable[[Run], None]] = {
    "numerics": gpu_numerics.numerics,
    "shapes": gpu_numerics.shapes_that_broke_others,
    "race": gpu_numerics.race,
    "speed": gpu_speed.dense,
    "packed": gpu_speed.packed,
    "overhead": gpu_speed.launch_overhead,
    "memory": gpu_speed.peak_memory,
    "tiles": gpu_speed.tile_sweep,
}


class Run:
    """Where the rows go, how much time is left, and what failed."""

    def __init__(self, path: Path) -> None:
        self.device, self.dryrun = DEVICE, DRYRUN
        self.started = time.monotonic()
        self.failures: list[str] = []
        self.stage = ""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("w")

    def row(self, **fields: Any) -> None:
        fields = {"stage": self.stage, **fields}
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()
        print("  ".join(f"{k}={shown(v)}" for k, v in fields.items() if k != "trace"), flush=True)
        if fields.get("ok") is False:
            self.failures.append(f"{self.stage}: {fields.get('case', fields.get('error', ''))}")

    def left(self) -> float:
        return BUDGET - (time.monotonic() - self.started)

    def enough_time(self, seconds: float, what: str) -> bool:
        """Whether that many seconds are left; if not, the row says what was left out."""
        if self.left() >= seconds or self.dryrun:
            return True
        self.row(skipped=what, needs_s=seconds, left_s=round(self.left()))
        return False

    def perform(self, stage: str) -> None:
        self.stage, began = stage, time.monotonic()
        try:
            STAGES[stage](self)
        except Exception as error:
            self.row(ok=False, error=repr(error), trace=traceback.format_exc())
        self.row(took_s=round(time.monotonic() - began, 1))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def results_path(facts: dict[str, Any]) -> Path:
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    card = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "dryrun").lower())
    return folder / f"gpu-{card}-{facts['date'][:10]}.jsonl"


def main(stages: list[str]) -> int:
    if not DRYRUN and not torch.cuda.is_available():
        print("torch sees no CUDA device; CLINATTN_GPU_DRYRUN=1 walks through this without one")
        return 1
    facts = environment(DEVICE)
    run = Run(results_path(facts))
    run.stage = "environment"
    run.row(**facts, **gpu_speed.card_facts(DEVICE))
    for stage in stages or STAGES:
        run.perform(stage)
    print(f"{len(run.failures)} failures; rows in {run.path}", *run.failures, sep="\n  ")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
