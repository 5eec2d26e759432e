"""Stage of gpu.py that runs small problems under NVIDIA's compute-sanitizer.

    python bench/gpu_sanitizer.py cuda     what it runs: forward and backward, nothing compared
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_numerics import CASES, Problem

if TYPE_CHECKING:
    from gpu import Run

SMALL = (
    "one-query dim40 dim128 causal-gqa lengths-gqa mask-bool-b11k mask-float-bhqk "
    "packed-empty-sequences packed-window"
).split()
# Every option that a tool takes beside those of all tools. torch probes the driver for functions
# that it may lack: failed API calls of that kind are no findings.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
SECONDS = 120  # for each tool
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)[^\n]*")


def sanitizer(run: Run) -> None:
    """memcheck and racecheck of small problems; skipped where the tool is missing or refuses."""
    child = [sys.executable, __file__, str(run.device)]
    plain = timed(child, max(30, min(200, run.left() - 10)))  # compiles what is not compiled yet
    if plain["exit"] != 0:
        run.row(case="without a tool", ok=False, error=plain["output"][-1000:])
        return
    run.row(case="without a tool", ok=True, took_s=plain["took_s"])
    tool = find_tool()
    if tool is None:
        run.row(skipped="compute-sanitizer: not found")
        return
    for name, options in TOOLS.items():
        if not run.enough_time(50, name):
            return
        command = [tool, "--tool", name, "--target-processes", "application-only", *options, *child]
        result = timed(command, min(SECONDS, run.left() - 15))
        found = SUMMARY.search(result["output"])
        if found is None:  # out of time, or a device that it does not support
            run.row(skipped=name, reason=result["output"][-300:], took_s=result["took_s"])
            continue
        ok = int(found[1]) == 0 and result["exit"] == 0
        details = {} if ok else {"error": found[0], "trace": result["output"][:8000]}
        run.row(case=name, ok=ok, took_s=result["took_s"], **details)


def timed(command: list[str], seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    # An access past a tensor shows only where no pool of memory lies behind it.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        code, output = None, f"not done after {seconds:.0f} s"
    except OSError as error:
        code, output = None, str(error)
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


def small_problems(device: str) -> None:
    cases = {case.id: case for case in CASES}
    for name in SMALL if device != "cpu" else SMALL[:1]:
        for dtype in (torch.bfloat16, torch.float32):
            Problem(cases[name], dtype, device).run("triton")
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    small_problems(sys.argv[1])
