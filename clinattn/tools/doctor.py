"""clinattn doctor: what can run on this machine, why the rest cannot, and what to do about it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from typing import Any

import torch

from clinattn.backends.compiled import compiled_module
from clinattn.backends.select import backends
from clinattn.tools import installation, peaks
from clinattn.tools.environment import environment

COMPILERS = ("c++", "g++", "clang++")


def diagnose() -> dict[str, Any]:
    """Versions and hardware, backends, the compiled module and its instruction sets, and hints."""
    statuses = backends()
    found = {name: list(status.reasons) for name, status in statuses.items()}
    compiled: dict[str, Any] = {}
    module = compiled_module()
    measured = peaks.measure()
    rates: dict[str, Any] = {}
    advice = hints(found)
    if module is not None and measured is not None:
        rates = measured._asdict()
        advice += peaks.advice(measured.attention, module.instruction_set())
        compiled = {
            "instruction sets here": module.instruction_sets(),
            "in force": module.instruction_set(),
            **module.build_info(),
        }
    return {
        "environment": environment(),
        "backends": found,
        "notes": {name: list(status.notes) for name, status in statuses.items() if status.notes},
        "kernels": installation.kernels(),
        "compiled module": compiled,
        "FLOP/s of a thread": rates,
        "compiler": compiler(),
        "hints": advice,
    }


def compiler() -> str | None:
    """First line of the C++ compiler's --version; None without one."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return (shown.stdout.splitlines() or [path])[0]
    return None


def hints(found: dict[str, list[str]]) -> list[str]:
    """Hints on what would make this machine faster, most useful first."""
    advice = []
    if untested := installation.untested_torch():
        advice.append(untested)
    if found["cpu"]:
        if compiler() is None:
            advice.append("install a C++ compiler (Debian: apt install g++), then: make ext")
        else:
            advice.append("build the CPU kernels: make ext")
    if torch.cuda.is_available() and found["triton"]:
        advice.append(f"no Triton kernels on this GPU: {'; '.join(found['triton'])}")
        if found["cuda"]:
            advice.append(f"no CUDA kernels either: {'; '.join(found['cuda'])}")
    missing = [
        name
        for name in ("pyarrow", "matplotlib", "jinja2")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        advice.append(f"clinattn bench needs {', '.join(missing)}: pip install 'clinattn[bench]'")
    return advice
