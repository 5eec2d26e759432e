"""clinattn doctor: what can run on this machine, why the rest cannot, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from clinattn.backends import cpu
from clinattn.backends.compiled import compiled_module
from clinattn.backends.select import backends
from clinattn.backends.triton import triton_interpreter
from clinattn.tools import advice, installation, peaks
from clinattn.tools.cpus import cpus
from clinattn.tools.environment import environment
from clinattn.tools.instruction_sets import instruction_sets, processor_flags, refusal
from clinattn.tools.other_work import Watch, here
from clinattn.tools.readiness import readiness

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OF_BENCH = ("pyarrow", "matplotlib", "jinja2")


def diagnose() -> dict[str, Any]:
    """Returns what `clinattn doctor --json` prints.

    environment, cpus, compiler: the machine. backends: each with whether it is usable, the reasons
    why not, and notes. kernels: the origin and the build of the compiled ones. instruction_sets:
    tools.instruction_sets.InstructionSet of each, with FLOP/s of a thread. warnings, slower,
    information: lines for people. ready, verdict: the last line; what, remedy: its parts.
    """
    module = compiled_module()
    refused = refusal(module)
    facts = environment()
    facts.pop("instruction_set")  # the table of sets says it
    in_force = None if refused else cpu.instruction_set()
    watch = Watch()
    measured = peaks.measure()
    other_work = here([watch.spent()], torch.device("cpu"))
    sets = instruction_sets(module, in_force, measured)
    statuses = backends()
    against = {name: list(status.reasons) for name, status in statuses.items()}
    machine = advice.Machine(
        environ=os.environ,
        threads=torch.get_num_threads(),
        cpus=cpus(),
        sets=tuple(sets),
        flags=frozenset(processor_flags() or ()),
        huge_pages=huge_pages(),
        other_work=other_work,
        against=against,
        interpreted=triton_interpreter(),
        cuda=torch.cuda.is_available(),
    )
    slower = advice.slower(machine)
    if measured is not None and in_force is not None:
        slower += peaks.advice(measured.attention, in_force)
    verdict = readiness(torch.device(facts["device"]), in_force, refused)
    build = {} if module is None else module.build_info()
    build.pop("instruction_sets", None)
    return {
        "environment": facts,
        "cpus": machine.cpus._asdict(),
        "compiler": installation.compiler(),
        "backends": {
            name: {"usable": bool(status), "reasons": against[name], "notes": list(status.notes)}
            for name, status in statuses.items()
        },
        "kernels": {"origin": installation.kernels(), **build},
        "instruction_sets": [x._asdict() for x in sets],
        "warnings": warnings(),
        "slower": slower,
        "information": [*advice.information(machine), *missing_packages()],
        "ready": verdict.ready,
        "verdict": str(verdict),
        "what": verdict.what,
        "remedy": verdict.remedy,
    }


def warnings() -> list[str]:
    """Lines on what is not known to work."""
    untested = installation.untested_torch()
    return [] if untested is None else [untested]


def missing_packages() -> list[str]:
    """A line on the packages that a benchmark needs and this environment lacks."""
    missing = [name for name in OF_BENCH if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    return [f"clinattn bench needs {', '.join(missing)}: pip install 'clinattn[bench]'"]


def huge_pages() -> str | None:
    """Linux's setting of transparent huge pages, which is between brackets; None without one."""
    try:
        words = HUGE_PAGES.read_text().split()
    except OSError:
        return None
    return next((word[1:-1] for word in words if word.startswith("[")), None)
