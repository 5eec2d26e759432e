"""Everything a GPU can tell about our kernels for it, in one command.

    python bench/gpu.py                        all stages, in the order of their worth
    python bench/gpu.py numerics race          these stages alone
    python bench/gpu.py --backends cuda        the CUDA C++ kernels alone
    python bench/gpu.py --tune                 time other tiles than those of kernels/configs.py
    CLINATTN_GPU_DRYRUN=1 python bench/gpu.py  all of it, tiny, without a GPU: Triton interpreted,
                                               the CUDA kernels as in tests/lib/emulated.py

Rows go to bench/results/gpu-<card>-<date>.jsonl, or to $OUT, one by one as they are measured; each
says where and with what it was taken. A failure is a row too: the rest goes on, and the exit code
tells at the end. A missed target is no failure.

Stages run one after the other in a process of their own, each for the seconds of its budget. One
that overruns, hangs or takes the CUDA context down ends with that process, and the next process
goes on with the stage after it. What `make gpu-pack` compiled ahead of time is used where it fits.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DRYRUN = os.environ.get("CLINATTN_GPU_DRYRUN") == "1"
if DRYRUN:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    # numpy warns of inf - inf in lanes that a tl.where then discards.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")

import gpu_pack  # noqa: E402

WORKER = "CLINATTN_GPU_WORKER"  # set for the process that performs stages
PACK = {} if DRYRUN or WORKER in os.environ else gpu_pack.take()  # before Triton is imported

import gpu_bits  # noqa: E402
import gpu_build  # noqa: E402
import gpu_calls  # noqa: E402
import gpu_candidates  # noqa: E402
import gpu_ceilings  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_clinical  # noqa: E402
import gpu_encoder  # noqa: E402
import gpu_graphs  # noqa: E402
import gpu_numerics  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_sanitizer  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_targets  # noqa: E402
import gpu_tiles  # noqa: E402
import gpu_verification  # noqa: E402
import torch  # noqa: E402
from gpu_jobs import device_answers  # noqa: E402

import clinattn  # noqa: E402
from clinattn.environment import environment  # noqa: E402

BUDGET = float(os.environ.get("CLINATTN_GPU_BUDGET", "840"))  # seconds of the whole run
DEVICE = torch.device("cpu" if DRYRUN else "cuda")
OURS = ("triton", "cuda")
PRINTED = 15  # failures of a stage that are printed; all of them are rows
OVERRUN = 20  # seconds past its budget after which a stage is ended from outside
LOST = 3  # exit code of a worker whose CUDA context is gone
# What they leave in a process would change what comes after: another extension, a profiler
LAST_OF_PROCESS = ("build", "encoder", "profile")


class Stage(NamedTuple):
    """perform(run) gives its results to run.row(...) and keeps to run.left()."""

    perform: Callable[[Run], None]
    seconds: float  # at most, with kernels compiled ahead of time


STAGES = {
    "build": Stage(gpu_build.build, 330),
    "ceilings": Stage(gpu_ceilings.ceilings, 20),
    "speed": Stage(gpu_speed.dense, 100),
    "clinical": Stage(gpu_clinical.clinical, 80),
    "numerics": Stage(gpu_numerics.numerics, 120),
    "encoder": Stage(gpu_encoder.encoder, 100),
    "candidates": Stage(gpu_candidates.candidates, 110),
    "bits": Stage(gpu_bits.bits, 40),
    "race": Stage(gpu_checks.race, 60),
    "capture": Stage(gpu_graphs.graph_capture, 40),
    "sync": Stage(gpu_graphs.no_host_sync, 30),
    "overhead": Stage(gpu_calls.launch_overhead, 20),
    "memory": Stage(gpu_calls.peak_memory, 20),
    "profile": Stage(gpu_profile.profile, 80),
    "shapes": Stage(gpu_checks.shapes_that_broke_others, 60),
    "numerics_rest": Stage(gpu_numerics.numerics_rest, 300),
    "sanitizer": Stage(gpu_sanitizer.sanitizer, 150),
    "flex": Stage(gpu_speed.flex, 240),
}
# These read the rows of the others and take no time.
CONCLUSIONS = {
    "targets": Stage(gpu_targets.targets, 30),
    "verification": Stage(gpu_verification.verification, 30),
}
TUNING = {"tiles": Stage(gpu_tiles.tile_sweep, 570)}
KNOWN = STAGES | CONCLUSIONS | TUNING


class Run:
    """Where the rows go, and how much time is left for the stage that runs.

    asked: those of our backends that it is about. backends: those of them that stages can call.
    """

    def __init__(self, path: Path, asked: list[str], facts: dict[str, Any]) -> None:
        self.device, self.dryrun, self.asked = DEVICE, DRYRUN, asked
        self.facts, self.stage = facts, ""
        self.until = end_of_run()
        self.printed: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a")
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
        """Seconds for the stage that runs."""
        return self.until - time.time()

    def enough_time(self, seconds: float, what: str) -> bool:
        """Whether that many seconds are left; if not, the row says what was left out."""
        if self.left() >= seconds or self.dryrun:
            return True
        self.row(skipped=what, needs_s=seconds, left_s=round(self.left()))
        return False

    def perform(self, stage: str) -> None:
        self.stage, began = stage, time.time()
        self.until = min(end_of_run(), began + KNOWN[stage].seconds)
        if stage not in CONCLUSIONS and not self.enough_time(5, stage):
            return
        # A kernel that hangs cannot be interrupted: say where, and end the process.
        faulthandler.dump_traceback_later(max(self.left(), 5) + OVERRUN, exit=True)
        torch.manual_seed(0)
        try:
            KNOWN[stage].perform(self)
        except Exception as error:
            self.row(ok=False, error=repr(error)[:300], trace=traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        self.row(took_s=round(time.time() - began, 1))


def end_of_run() -> float:
    started = float(os.environ.setdefault("CLINATTN_GPU_STARTED", str(time.time())))
    return started + BUDGET


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
    if text not in KNOWN:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(KNOWN)}")
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
    stages = options.stages or list(TUNING if options.tune else STAGES | CONCLUSIONS)
    if DRYRUN and not (options.stages or options.tune):
        stages = list(KNOWN)
    facts = {**environment(DEVICE), **card_facts(), **PACK}
    facts["commit"] = options.commit or facts["commit"]
    path = options.append or results_path(facts)
    if options.append is None:
        path.unlink(missing_ok=True)
    in_each = ("date", "gpu", "driver", "torch", "triton", "commit")
    run = Run(path, options.backends, {x: facts.get(x) for x in in_each})
    if WORKER in os.environ:
        return work(run, stages)
    run.stage = "environment"
    run.row(**facts)
    for name in run.asked:
        if "build" not in stages and name not in run.backends:
            run.row(backend=name, skipped=name, reason=repr(clinattn.backends()[name]))
    given = ["--append", str(path), "--backends", ",".join(options.backends)]
    given += ["--commit", facts["commit"]] if facts["commit"] else []
    in_workers(run, given, stages)
    return summary(run)


def work(run: Run, stages: list[str]) -> int:
    """Performs stages until one loses the CUDA context or is the last that a process can have."""
    for at, stage in enumerate(stages):
        run.perform(stage)
        if not device_answers(DEVICE):
            run.row(ok=False, error="the CUDA context is lost; the rest runs in a new process")
            return LOST
        if stage in LAST_OF_PROCESS and not CONCLUSIONS.keys() >= set(stages[at + 1 :]):
            return 0
    return 0


def in_workers(run: Run, given: list[str], stages: list[str]) -> None:
    """Performs all stages, in as many processes as it takes."""
    while stages:
        before = run.path.stat().st_size
        command = [sys.executable, __file__, *given, *stages]
        child = subprocess.Popen(command, env=os.environ | {WORKER: "1"}, start_new_session=True)
        try:
            code = child.wait()
        finally:  # whatever it started ends with it, also when this process is interrupted
            end_group(child)
        rows = rows_from(run.path, before)
        for row in rows:
            os.environ.update(row.get("settings", {}))
        ended = {
            row["stage"] for row in rows if "took_s" in row or row.get("skipped") == row["stage"]
        }
        left = [stage for stage in stages if stage not in ended]
        if code not in (0, LOST) and left:
            run.stage = left[0]
            run.row(ok=False, error=f"ended with exit code {code}, or ran for too long")
        stages = left[1:] if code not in (0, LOST) or left == stages else left


def rows_from(path: Path, offset: int) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        file.seek(offset)
        return [json.loads(line) for line in file.read().splitlines()]


def end_group(child: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


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
