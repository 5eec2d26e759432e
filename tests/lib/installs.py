"""Copies of the repository to build from, and commands that run away from it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from places import ROOT


def run(
    *command: object, cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command away from the repository's root, with the error output in the failure."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("CLINATTN_")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=keep | environment, capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def repository_files() -> list[str] | None:
    """The paths that git keeps; None where git or the checkout is missing."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    command.append("--exclude-standard")
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


def copy_repository(folder: Path) -> None:
    """Copies what git keeps, or without git all but what builds and runs leave behind."""
    names = repository_files()
    if names is None:
        left = ("__pycache__", "*.so", ".venv*", "build", "dist", "*.egg-info", ".pytest_cache")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left), dirs_exist_ok=True)
        return
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
