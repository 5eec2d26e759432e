"""Many small jobs in processes of their own: a crash or a hang costs no other job.

    for row, left in in_processes("gpu.numerics:check_job", jobs, run, seconds):

A job is anything that JSON holds; function(job, device) returns its row, a dict.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the package gpu
from gpu.rows import Run

HANGS = 60  # seconds after which a job is taken for hung: compiling can take 30
GRACE = 15  # seconds for the job that runs when the time is over
ROW = "row: "  # begins a line of a process that holds a row
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # asked for by torch.use_deterministic_algorithms
}


def in_processes(
    function: str, jobs: list[Any], run: Run, seconds: float
) -> Iterator[tuple[dict[str, Any] | None, list[Any]]]:
    """Yields (row, []) as each job ends, and (None, jobs left for want of time) by process."""
    workers = 1 if run.dryrun else max(1, min(len(jobs), (os.cpu_count() or 4) - 2))
    until = time.monotonic() + seconds
    ended: queue.Queue[tuple[dict[str, Any] | None, list[Any]]] = queue.Queue()
    environment = dict(os.environ)  # a thread that reads it may meet a change of it

    def share(some: list[Any]) -> None:
        left = some
        try:
            left = all_of(function, some, run, until, environment, lambda x: ended.put((x, [])))
        finally:
            ended.put((None, left))

    with ThreadPoolExecutor(workers) as pool:
        for i in range(workers):
            pool.submit(share, jobs[i::workers])
        working = workers
        while working:
            row, left = ended.get()
            working -= row is None
            yield row, left


def all_of(
    function: str,
    jobs: list[Any],
    run: Run,
    until: float,
    environment: dict[str, str],
    ended: Callable[[dict[str, Any]], None],
) -> list[Any]:
    """Calls ended(row) for each job, in a new process after a crash; returns the jobs left."""
    while jobs:
        seconds = until - time.monotonic()
        if seconds < 5 and not run.dryrun:
            return jobs
        done, crash = one_process(function, jobs, run, seconds, environment, ended)
        jobs = jobs[done:]
        if crash is not None and jobs:
            ended({"job": jobs[0], "ok": False, "error": crash})
            jobs = jobs[1:]
    return []


def one_process(
    function: str,
    jobs: list[Any],
    run: Run,
    seconds: float,
    environment: dict[str, str],
    ended: Callable[[dict[str, Any]], None],
) -> tuple[int, str | None]:
    """(jobs done, what took the process down in the job after them)."""
    done, timer = 0, None
    with tempfile.TemporaryFile("w+") as errors:
        arguments = [function, json.dumps(jobs), str(run.device), str(seconds)]
        child = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=environment | SETTINGS,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        if not run.dryrun:  # one that neither ends nor answers
            timer = threading.Timer(seconds + GRACE, child.kill)
            timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(ROW):
                ended(json.loads(line[len(ROW) :]))
                done += 1
        code = child.wait()
        if timer is not None:
            timer.cancel()
        errors.seek(0)
        crash = f"exit {code}: {errors.read().strip()[-1500:]}" if code else None
    return done, crash


def output_of(
    command: list[str], seconds: float, settings: dict[str, str], folder: Path | None = None
) -> tuple[int | None, str]:
    """(exit code, what it printed); out of time, all that it started ends with it."""
    try:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return None, str(error)
    try:
        output, _ = child.communicate(timeout=seconds)
        return child.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        return None, f"{output}\nnot done after {seconds:.0f} s"


def main(function: str, jobs: str, device: str, seconds: str) -> None:
    began = time.monotonic()
    module, name = function.split(":")
    perform = getattr(importlib.import_module(module), name)
    for job in json.loads(jobs):
        if time.monotonic() - began > float(seconds) and device != "cpu":
            return
        if device != "cpu":  # where kernels are interpreted, a job takes what it takes
            faulthandler.dump_traceback_later(HANGS, exit=True)
        row = {"job": job} | perform(job, device)
        print(ROW + json.dumps(row), flush=True)
        if row["ok"] is False and not device_answers(device):
            os._exit(0)  # the next process takes over
        faulthandler.cancel_dump_traceback_later()


def device_answers(device: torch.device | str) -> bool:
    """False once a kernel has taken the CUDA context down: every later call would fail."""
    try:
        return torch.ones(1, device=device).item() == 1
    except Exception:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
