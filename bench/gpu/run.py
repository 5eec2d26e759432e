"""Everything a GPU can tell about our kernels for it, in one command.

    python bench/gpu/run.py                        all stages, in the order of their worth
    python bench/gpu/run.py numerics race          these stages alone
    python bench/gpu/run.py --backends cuda        the CUDA C++ kernels alone
    python bench/gpu/run.py --tune                 time other tiles than those of kernels/configs.py
    CLINATTN_GPU_DRYRUN=1 python bench/gpu/run.py  all of it, tiny, without a GPU: Triton
                                                   interpreted, the CUDA kernels as in
                                                   tests/lib/emulated.py

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the package gpu
DRYRUN = os.environ.get("CLINATTN_GPU_DRYRUN") == "1"
if DRYRUN:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    # numpy warns of inf - inf in lanes that a tl.where then discards.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")

import gpu  # noqa: E402
from gpu import unpacking  # noqa: E402

WORKER = "CLINATTN_GPU_WORKER"  # set for the process that performs stages
PACK = {} if DRYRUN or WORKER in os.environ else unpacking.take()  # before Triton is imported

import torch  # noqa: E402

import clinattn  # noqa: E402
from clinattn.tools.environment import environment  # noqa: E402
from gpu import (  # noqa: E402
    bits,
    build,
    candidates,
    ceilings,
    checks,
    clinical,
    encoder,
    graphs,
    numerics,
    overhead,
    profilers,
    sanitizer,
    speed,
    summaries,
    sweep,
    targets,
    verification,
)
from gpu.jobs import device_answers  # noqa: E402
from gpu.rows import PRINTED, Run  # noqa: E402

DEVICE = torch.device("cpu" if DRYRUN else "cuda")
OURS = ("triton", "cuda")
OVERRUN = 20  # seconds past its budget after which a stage is ended from outside
LOST = 3  # exit code of a worker whose CUDA context is gone
# Stages that leave in a process what would change later ones: another extension, a profiler
LAST_OF_PROCESS = ("build", "encoder", "profile")


class Stage(NamedTuple):
    """perform(run) gives its results to run.row(...) and keeps to run.left()."""

    perform: Callable[[Run], None]
    seconds: float  # at most, with kernels compiled ahead of time


STAGES = {
    "build": Stage(build.build, 330),
    "ceilings": Stage(ceilings.ceilings, 20),
    "speed": Stage(speed.dense, 100),
    "clinical": Stage(clinical.clinical, 80),
    "numerics": Stage(numerics.numerics, 120),
    "encoder": Stage(encoder.encoder, 100),
    "candidates": Stage(candidates.candidates, 110),
    "bits": Stage(bits.bits, 60),
    "race": Stage(checks.race, 80),
    "summaries": Stage(summaries.summaries, 60),
    "capture": Stage(graphs.graph_capture, 40),
    "sync": Stage(graphs.no_host_sync, 30),
    "overhead": Stage(overhead.launch_overhead, 20),
    "memory": Stage(overhead.peak_memory, 20),
    "profile": Stage(profilers.profile, 160),
    "shapes": Stage(checks.shapes_that_broke_others, 60),
    "numerics_rest": Stage(numerics.numerics_rest, 300),
    "sanitizer": Stage(sanitizer.sanitizer, 150),
    "flex": Stage(speed.flex, 240),
}
# Stages that read the rows of the others and take no time.
CONCLUSIONS = {
    "targets": Stage(targets.targets, 30),
    "verification": Stage(verification.verification, 30),
}
TUNING = {"tiles": Stage(sweep.tile_sweep, 570)}
KNOWN = STAGES | CONCLUSIONS | TUNING


def perform(run: Run, stage: str) -> None:
    began = time.time()
    run.begin(stage, KNOWN[stage].seconds)
    if stage not in CONCLUSIONS and not run.enough_time(5, stage):
        return
    # A kernel that hangs cannot be interrupted: say where, and end the process.
    faulthandler.dump_traceback_later(max(run.left(), 5) + OVERRUN, exit=True)
    torch.manual_seed(0)
    try:
        KNOWN[stage].perform(run)
    except Exception as error:
        run.row(ok=False, error=repr(error)[:300], trace=traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()
    run.row(took_s=round(time.time() - began, 1))


def card_facts() -> dict[str, Any]:
    """Facts that the numbers depend on: the driver, the card as found, and cuDNN's version."""
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
    bench = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("OUT") or bench / ("out" if DRYRUN else "results"))
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
    elif WORKER not in os.environ and path.exists():
        take_settings(path)
    in_each = ("date", "gpu", "driver", "torch", "triton", "commit")
    run = Run(path, options.backends, {x: facts.get(x) for x in in_each}, DEVICE)
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


def take_settings(path: Path) -> None:
    """Takes the settings among the rows of an earlier run, as the stages after those rows did."""
    for line in path.read_text().splitlines():
        os.environ.update(json.loads(line).get("settings", {}))
    gpu.stand_in()


def work(run: Run, stages: list[str]) -> int:
    """Performs stages until one loses the CUDA context or is the last that a process can have."""
    for at, stage in enumerate(stages):
        perform(run, stage)
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
        rows = run.rows_from(before)
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
