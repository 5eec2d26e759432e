"""First stage of run.py: compiles the CUDA kernels for this card, then calls each backend once.

A backend with a row here that is not ok is left out of the stages that follow.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

import torch

from clinattn import fused_attention
from clinattn.tools.environment import cpu_count
from gpu import EMULATED
from gpu.jobs import in_processes, output_of
from gpu.rows import Run
from gpu.training import gradients, inputs
from gpu.unpacking import EXTENSION_TAKEN, ROOT

SECONDS = 270  # of the ten minutes
TARGET = 300  # seconds on two cores, for one architecture
CALLING = 60


def build(run: Run) -> None:
    """Builds for the card that is present (a dry run: emulated), and calls each backend once."""
    if "cuda" in run.asked and os.environ.get(EXTENSION_TAKEN) != "1":
        compiled(run)
    jobs = [name for name in run.asked if name not in run.broken()]
    for row, left in in_processes("gpu.build:first_call", jobs, run, CALLING):
        if row is not None:
            run.row(case="first call", backend=row.pop("job"), **row)
        for name in left:
            run.row(case="first call", backend=name, ok=False, error=f"not in {CALLING} s")


def compiled(run: Run) -> None:
    """Compiles; rows hold the seconds taken, and those of two cores, never less than measured."""
    fields: dict[str, Any] = {"case": "compile", "backend": "cuda"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    settings = {"CLINATTN_CUDA": "1"}
    if run.dryrun:
        command = [sys.executable, "tests/lib/emulated.py"]
        settings["PYTHONSAFEPATH"] = ""  # emulated.py imports what lies beside it
    elif not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        capability = torch.cuda.get_device_capability(run.device)
        settings["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, capability))
    fields["archs"] = settings.get("TORCH_CUDA_ARCH_LIST", os.environ.get("TORCH_CUDA_ARCH_LIST"))
    # "build" keeps what did not change.
    fresh = run.dryrun or not list(ROOT.glob("build/*/cuda/*.o"))
    began, cpu_before = time.monotonic(), cpu_seconds()
    limit = min(SECONDS, run.left() - CALLING) if not run.dryrun else 2 * SECONDS
    code, output = output_of(command, limit, settings, ROOT)
    seconds, cpu = time.monotonic() - began, cpu_seconds() - cpu_before
    if code != 0:
        fields |= {"error": output[-600:], "trace": output[-6000:]}
    run.row(**fields, ok=code == 0, seconds=seconds, cpu_seconds=cpu, cpus=cpu_count(), fresh=fresh)
    if code == 0:
        measured = max(seconds, cpu / 2) if fresh else None
        met = measured <= TARGET if fresh else None
        name = "seconds of compiling on two cores"
        run.row(case=name, backend="cuda", target=TARGET, measured=measured, met=met)
        if run.dryrun:  # for the processes of the stages that follow
            library = {EMULATED: output.split()[-1]}
            os.environ.update(library)
            run.row(case="emulated library", backend="cuda", settings=library)


def cpu_seconds() -> float:
    """CPU seconds of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_call(backend: str, device: str) -> dict[str, Any]:
    """Checks that forward and backward return at all; other stages check the results."""
    q, k, v, do = inputs(device, 1, 1, 16, 16)
    try:
        for x in gradients(fused_attention, q, k, v, do, backend=backend):
            x.sum().item()
        return {"ok": True}
    except Exception as error:
        return {"ok": False, "error": str(error)[:600]}
