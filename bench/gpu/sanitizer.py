"""Stage of run.py that runs the table of cases under NVIDIA's compute-sanitizer.

    python bench/gpu/sanitizer.py cuda triton 0 3 60

runs forward and backward of the first third of the cases, and summaries of the foremost, as many as
60 seconds allow; nothing is compared.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the package gpu
from gpu.jobs import output_of
from gpu.rows import Run
from gpu.table_of_cases import CASES, FEATURES, FIRST, Problem, SummaryProblem

DTYPES = (torch.bfloat16, torch.float32)
REDUCTIONS = ("relevance", "topk")  # one for each kernel of summaries, with most to do
# Every option that a tool takes beside those of all tools. torch probes the driver for functions
# that it may lack: failed API calls of that kind are no findings.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
PLAIN, CHECKED = 15, 45  # seconds for cases; more for a tool where no stage waits for them
# Shares of a backend's processes: on an H100 three took 65 s for memcheck of all problems, and for
# racecheck would have taken 350.
SHARES = {"memcheck": 1, "racecheck": 5}
GRACE = 45  # seconds more to start, and to end the last case
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)[^\n]*")
DONE = re.compile(r"(\d+) of (\d+) problems")


def sanitizer(run: Run) -> None:
    """memcheck and racecheck of each backend, side by side; skipped where a tool refuses."""
    if not run.enough_time(PLAIN + GRACE, "sanitizer"):
        return
    jobs = [(None, "none", backend, 0, 1, PLAIN) for backend in run.backends]
    working = [row["backend"] for row in side_by_side(jobs, run) if row["ok"]]
    tool = find_tool()
    if tool is None:
        run.row(skipped="compute-sanitizer: not found")
        return
    if not run.enough_time(CHECKED + GRACE, "the tools of compute-sanitizer"):
        return
    seconds = max(CHECKED, run.left() - GRACE)
    processes = (os.cpu_count() or 4) - 2
    share = processes // (len(working) * sum(SHARES.values())) if working else 0
    checks = [
        (tool, name, backend, part, parts, seconds)
        for name, shares in SHARES.items()
        for parts in [max(1, share * shares) if not run.dryrun else 1]
        for backend in working
        for part in range(parts)
    ]
    side_by_side(checks, run)


def side_by_side(jobs: list[Any], run: Run) -> list[dict[str, Any]]:
    """Writes and returns the rows of checked(*job, device)."""
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        rows = list(pool.map(lambda job: checked(*job, str(run.device)), jobs))
    for row in rows:
        run.row(**row)
    return rows


def checked(
    tool: str | None, name: str, backend: str, part: int, parts: int, seconds: float, device: str
) -> dict[str, Any]:
    """Row of one part of the table in a process, under a tool or, to compile kernels, without."""
    command = [sys.executable, __file__, device, backend, str(part), str(parts), str(seconds)]
    if tool is not None:
        only = ["--target-processes", "application-only"]
        command = [tool, "--tool", name, *only, *TOOLS[name], *command]
    result = timed(command, seconds + GRACE)
    output, done = result["output"], DONE.search(result["output"])
    row = {"backend": backend, "tool": name, "part": f"{part + 1}/{parts}"}
    row |= {"took_s": result["took_s"]}
    row |= {"problems": int(done[1]), "of": int(done[2])} if done else {}
    found = SUMMARY.search(output)
    if tool is not None and found is None:  # out of time, or a device that it does not support
        return {**row, "skipped": name, "reason": output[-300:]}
    clean = result["exit"] == 0 and (found is None or int(found[1]) == 0)
    words = found[0] if found else f"exit {result['exit']}"
    if not clean:  # the first findings, and what ended it
        row["trace"] = output if len(output) < 8000 else f"{output[:6000]}\n...\n{output[-2000:]}"
    return {**row, "ok": clean, "result": words}


def timed(command: list[str], seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    # An access past a tensor shows only where no pool of memory lies behind it.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    code, output = output_of(command, seconds, settings)
    return {"exit": code, "output": output, "took_s": round(time.monotonic() - began, 1)}


def find_tool() -> str | None:
    """compute-sanitizer: on PATH, in a CUDA toolkit, or in one of NVIDIA's packages."""
    name = "compute-sanitizer"
    found = shutil.which(name)
    if found:
        return found
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    toolkits += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    places = [folder / sub / name for folder in toolkits for sub in ("bin", "compute-sanitizer")]
    for packages in {sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])}:
        places += sorted(Path(packages, "nvidia").glob(f"**/{name}"))
    return next((str(x) for x in places if x.is_file() and os.access(x, os.X_OK)), None)


def problems(device: str, backend: str, part: int, parts: int, seconds: float) -> None:
    """A part of the table in two dtypes, the cases of FIRST first, of which summaries too."""
    until = time.monotonic() + seconds
    cases = {case.id: case for case in (*CASES, *FEATURES)}
    names = [*FIRST, *(x for x in cases if x not in FIRST)] if device != "cpu" else FIRST[:1]
    jobs = list(itertools.product(names, DTYPES))[part::parts]
    done = 0
    for name, dtype in jobs:
        if time.monotonic() < until:
            Problem(cases[name], dtype, device).run(backend)
            for reduce in REDUCTIONS if name in FIRST else ():
                SummaryProblem(cases[name], dtype, device).summary(reduce, backend)
            done += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{done} of {len(jobs)} problems")


if __name__ == "__main__":
    problems(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), float(sys.argv[5]))
