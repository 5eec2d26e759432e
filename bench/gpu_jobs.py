"""Many small jobs in processes of their own: a crash or a hang costs no other job.

    rows = in_processes("gpu_numerics:check_job", jobs, run, seconds)

A job is anything that JSON holds; function(job, device) returns its row, a dict.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gpu import Run

HANGS = 120  # seconds after which a job is taken for hung: compiling can take 30
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # asked for by torch.use_deterministic_algorithms
}


def in_processes(
    function: str, jobs: list[Any], run: Run, seconds: float
) -> Iterator[tuple[list[dict[str, Any]], list[Any]]]:
    """For each process (rows, jobs left for want of time), as they end."""
    workers = 1 if run.dryrun else max(1, min(len(jobs), (os.cpu_count() or 4) - 2))
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(workers) as pool:
        shares = [jobs[i::workers] for i in range(workers)]
        yield from pool.map(lambda share: all_of(function, share, run, until), shares)


def all_of(
    function: str, jobs: list[Any], run: Run, until: float
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The rows of these jobs; after a crash the next process takes over."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(jobs):
        left = jobs[len(rows) :]
        seconds = until - time.monotonic()
        if seconds < 5 and not run.dryrun:
            return rows, left
        done, crash = one_process(function, left, run, seconds)
        rows += done
        if crash is not None:
            rows.append({"job": left[len(done)], "ok": False, "error": crash})
    return rows, []


def one_process(
    function: str, jobs: list[Any], run: Run, seconds: float
) -> tuple[list[dict[str, Any]], str | None]:
    """(rows, what took the process down in the job after them)."""
    with tempfile.NamedTemporaryFile("r+", suffix=".jsonl") as out:
        arguments = [function, json.dumps(jobs), out.name, str(run.device), str(seconds)]
        command = [sys.executable, __file__, *arguments]
        end = f"not over {2 * HANGS} s after its time"
        try:
            child = subprocess.run(
                command,
                env=os.environ | SETTINGS,
                timeout=max(seconds, 0) + 2 * HANGS,
                capture_output=True,
                text=True,
            )
            end = f"exit {child.returncode}: {child.stderr.strip()[-1500:]}"
            crashed = child.returncode != 0
        except subprocess.TimeoutExpired:
            crashed = True
        rows = [json.loads(line) for line in out.read().splitlines()]
    return rows, end if crashed and len(rows) < len(jobs) else None


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


def main(function: str, jobs: str, path: str, device: str, seconds: str) -> None:
    began = time.monotonic()
    module, name = function.split(":")
    perform = getattr(importlib.import_module(module), name)
    with open(path, "w") as out:
        for job in json.loads(jobs):
            if time.monotonic() - began > float(seconds) and device != "cpu":
                return
            faulthandler.dump_traceback_later(HANGS, exit=True)
            row = {"job": job} | perform(job, device)
            print(json.dumps(row), file=out, flush=True)
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
