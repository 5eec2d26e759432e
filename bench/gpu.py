"""Everything a GPU can tell about our kernels for it, in one command of under ten minutes.

    python bench/gpu.py                        build, numerics, races, graphs, speed, targets
    python bench/gpu.py numerics race          these stages alone
    python bench/gpu.py --backends cuda        the CUDA C++ kernels alone
    python bench/gpu.py --tune                 time other tiles than those of kernels/configs.py
    CLINATTN_GPU_DRYRUN=1 python bench/gpu.py  all of it, tiny, without a GPU: Triton interpreted,
                                               the CUDA kernels as in tests/emulated.py

Rows go to bench/results/gpu-<card>-<date>.jsonl, or to $OUT; each says where and with what it was
taken. A failure is a row too: the rest goes on, and the exit code tells at the end. A missed target
is no failure.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRYRUN = os.environ.get("CLINATTN_GPU_DRYRUN") == "1"
if DRYRUN:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    # numpy warns of inf - inf in lanes that a tl.where then discards.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")

import gpu_build  # noqa: E402
import gpu_calls  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_clinical  # noqa: E402
import gpu_graphs  # noqa: E402
import gpu_numerics  # noqa: E402
import gpu_sanitizer  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_targets  # noqa: E402
import gpu_tiles  # noqa: E402
import gpu_verification  # noqa: E402
import torch  # noqa: E402
from gpu_jobs import device_answers  # noqa: E402

import clinattn  # noqa: E402
from clinattn.environment import environment  # noqa: E402

BUDGET = float(os.environ.get("CLINATTN_GPU_BUDGET", "570"))  # seconds
DEVICE = torch.device("cpu" if DRYRUN else "cuda")
OURS = ("triton", "cuda")
PRINTED = 15  # failures of a stage that are printed; all of them are rows

# A stage is called as stage(run) and gives its results to run.row(...).
STAGES: dict[str, Callable[[Run], None]] = {
    "build": gpu_build.build,
    "numerics": gpu_numerics.numerics,
    "shapes": gpu_checks.shapes_that_broke_others,
    "race": gpu_checks.race,
    "capture": gpu_graphs.graph_capture,
    "sync": gpu_graphs.no_host_sync,
    "overhead": gpu_calls.launch_overhead,
    "memory": gpu_calls.peak_memory,
    "speed": gpu_speed.dense,
    "clinical": gpu_clinical.clinical,
    "sanitizer": gpu_sanitizer.sanitizer,
    "flex": gpu_speed.flex,
    "targets": gpu_targets.targets,
    "verification": gpu_verification.verification,
}
TUNING: dict[str, Callable[[Run], None]] = {"tiles": gpu_tiles.tile_sweep}


class Run:
    """Where the rows go, how much time is left, and which stages are still to come.

    asked: those of our backends that it is about. backends: those of them that stages can call.
    """

    def __init__(
        self, path: Path, asked: list[str], facts: dict[str, Any], started: float, append: bool
    ) -> None:
        self.device, self.dryrun, self.asked = DEVICE, DRYRUN, asked
        self.facts, self.started = facts, started
        self.stage, self.coming = "", 0
        self.printed: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a" if append else "w")
        usable, broken = clinattn.backends(), self.broken()
        self.backends = [name for name in asked if usable[name] and name not in broken]

    def row(self, **fields: Any) -> None:
        fields = {"stage": self.stage, **fields}
        self.file.write(json.dumps(fields | self.facts) + "\n")
        self.file.flush()
        if fields.get("ok") is False:
            self.printed[self.stage] += 1
            if self.printed[self.stage] > PRINTED:
                return
        print("  ".join(f"{k}={shown(v)}" for k, v in fields.items() if k != "trace"), flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def broken(self) -> set[str]:
        """Those that could not be built, or whose first call failed."""
        return {x["backend"] for x in self.rows() if x["stage"] == "build" and x.get("ok") is False}

    def left(self) -> float:
        return BUDGET - (time.time() - self.started)

    def enough_time(self, seconds: float, what: str) -> bool:
        """Whether that many seconds are left; if not, the row says what was left out."""
        if self.left() >= seconds or self.dryrun:
            return True
        self.row(skipped=what, needs_s=seconds, left_s=round(self.left()))
        return False

    def perform(self, stage: str) -> None:
        self.stage, began = stage, time.time()
        torch.manual_seed(0)
        try:
            (STAGES | TUNING)[stage](self)
        except Exception as error:
            self.row(ok=False, error=repr(error)[:300], trace=traceback.format_exc())
        self.row(took_s=round(time.time() - began, 1))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def card_facts() -> dict[str, Any]:
    """What the numbers depend on and torch does not tell: the driver, and the card as found."""
    if DEVICE.type != "cuda":
        return {"dryrun": True}
    names = ("driver", "power_limit", "max_sm_clock", "gpu_memory")
    query = "driver_version,power.limit,clocks.max.sm,memory.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        values = [x.strip() for x in done.stdout.splitlines()[0].split(",")]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        values = []
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        **dict(zip(names, values, strict=False)),
        "sms": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
    }


def results_path(facts: dict[str, Any]) -> Path:
    here = Path(__file__).parent
    folder = Path(os.environ.get("OUT") or here / ("out" if DRYRUN else "results"))
    card = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "dryrun").lower())
    return folder / f"gpu-{card}-{facts['date'][:10]}.jsonl"


def stage_name(text: str) -> str:
    if text not in STAGES | TUNING:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(STAGES | TUNING)}")
    return text


def backend_names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(OURS):
        raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(OURS)}")
    return names


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", type=stage_name, help="default: all but tiles")
    parser.add_argument("--tune", action="store_true", help="the stage tiles alone")
    parser.add_argument("--backends", type=backend_names, default=list(OURS), help="triton,cuda")
    parser.add_argument("--commit", help="of the sources, where they come without .git")
    parser.add_argument("--append", type=Path, help="go on with the rows of this file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if not DRYRUN and not torch.cuda.is_available():
        print("torch sees no CUDA device; CLINATTN_GPU_DRYRUN=1 walks through this without one")
        return 1
    stages = options.stages or list(TUNING if options.tune else STAGES)
    if DRYRUN and not (options.stages or options.tune):
        stages = [*STAGES, *TUNING]
    facts = {**environment(DEVICE), **card_facts()}
    facts["commit"] = options.commit or facts["commit"]
    path = options.append or results_path(facts)
    in_each = ("date", "gpu", "driver", "torch", "triton", "commit")
    started = float(os.environ.setdefault("CLINATTN_GPU_STARTED", str(time.time())))
    appended = options.append is not None
    run = Run(path, options.backends, {x: facts.get(x) for x in in_each}, started, appended)
    if not appended:
        run.stage = "environment"
        run.row(**facts)
        for name in run.asked:
            if "build" not in stages and name not in run.backends:
                run.row(backend=name, skipped=name, reason=repr(clinattn.backends()[name]))
    # A kernel that hangs cannot be interrupted: say where, and end.
    faulthandler.dump_traceback_later(max(run.left(), 30) + 20, exit=True)
    for at, stage in enumerate(stages, 1):
        run.coming = len(stages) - at
        run.perform(stage)
        lost = not device_answers(DEVICE)
        if lost:
            run.row(ok=False, error="the CUDA context is lost; the rest runs in a new process")
        if lost or stage == "build":  # this process has loaded what was there before
            go_on(run.path, options, stages[at:])
    return summary(run)


def go_on(path: Path, options: argparse.Namespace, stages: list[str]) -> None:
    """Become a new process for the stages that remain."""
    if not stages:
        return
    sys.stdout.flush()
    os.closerange(3, 4096)  # among them the lost context and its memory
    given = ["--append", str(path), "--backends", ",".join(options.backends)]
    given += ["--commit", options.commit] if options.commit else []
    os.execv(sys.executable, [sys.executable, __file__, *given, *stages])


def summary(run: Run) -> int:
    rows = run.rows()
    skipped = [f"{row['stage']}: {row['skipped']}" for row in rows if "skipped" in row]
    words = ("stage", "backend", "case", "provider", "tool", "error", "result")
    failed = [
        "  ".join(str(row[word]) for word in words if row.get(word))[:200]
        for row in rows
        if row.get("ok") is False
    ]
    print(f"{len(skipped)} left out", *skipped[:PRINTED], sep="\n  ")
    print(f"{len(failed)} failures; rows in {run.path}", *failed[: 2 * PRINTED], sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
