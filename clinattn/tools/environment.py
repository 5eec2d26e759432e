"""Facts that a number depends on: hardware, threads, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import clinattn
from clinattn.backends.cpu import instruction_set

PACKAGES = ("triton", "numpy", "pyarrow", "transformers")


def load_average() -> float | None:
    """Processes that ran or waited, their mean over the last minute; None where nothing tells."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


LOAD_AT_START = load_average()  # before this program's own work


def versions() -> str:
    """Versions of clinattn and torch, in a line."""
    return f"clinattn {clinattn.__version__}, torch {torch.__version__}"


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The facts of this process; versions are None for what is not installed."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clinattn": clinattn.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, which a wheel's own version may lack
        **{name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "load_average": LOAD_AT_START,
        "device": device.type,
        "gpu": None,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["cuda"] = torch.version.cuda
    return facts


def cpu_name() -> str:
    """The processor's name; on Linux platform.processor() is often empty."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_count() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_commit() -> str | None:
    """Short commit of the source tree, with + if it is changed; None outside one.

    CLINATTN_COMMIT names that of a copy without .git.
    """
    if given := os.environ.get("CLINATTN_COMMIT"):
        return given
    root = Path(clinattn.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
