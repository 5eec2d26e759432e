"""Runs a guide of docs/guides/ as its reader would: block after block, in one folder.

The Python blocks of a guide share a namespace, and its shell blocks run in the same folder, so that
a block may use what an earlier one has made. A block below the comment `<!-- not run: REASON -->`
is not run; the reasons are those of REASONS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from documentation import GUIDES, OF_INTEGRATIONS, Block, split

REASONS = {
    "needs a GPU",
    "needs data of yours",
    "needs a model of yours",
    "needs a network",
    "takes minutes",
    "needs a program of yours",
}


def all_blocks(guide: Path) -> list[Block]:
    return split(guide)[0]


def needs_integrations(guide: Path) -> bool:
    """Returns whether a block imports one of their packages, or reads or writes a checkpoint."""
    return any(
        block.packages() & OF_INTEGRATIONS or "_pretrained(" in block.code
        for block in all_blocks(guide)
        if block.language == "python" and not block.not_run
    )


def runs_commands(guide: Path) -> bool:
    return any(block.language == "sh" and not block.not_run for block in all_blocks(guide))


def of_kind(kind: str) -> list[Path]:
    """The guides whose blocks need packages of the integrations, run commands, or neither."""

    def its_kind(guide: Path) -> str:
        if needs_integrations(guide):
            return "integrations"
        return "commands" if runs_commands(guide) else "plain"

    return [guide for guide in GUIDES if its_kind(guide) == kind]


def run(guide: Path, folder: Path) -> dict[str, Any]:
    """Runs the blocks of a guide in a folder, the working directory, and returns their namespace.

    Raises AssertionError, with what was printed, for a command that fails.
    """
    programs = write_programs(folder.parent / f"{folder.name}-programs")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in all_blocks(guide):
        if block.not_run:
            continue
        if block.language == "python":
            block.run(namespace)
        else:
            _run_commands(block, folder, programs)
    return namespace


def write_programs(folder: Path) -> Path:
    """A folder for PATH: python is this one, and clinattn is the package that it imports."""
    folder.mkdir(exist_ok=True)
    for name, arguments in (("python", ""), ("clinattn", "-m clinattn ")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        path.chmod(0o755)
    return folder


def _run_commands(block: Block, folder: Path, programs: Path) -> None:
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    for name in ("MEDS_DIR", "CLINATTN_MEDS_DIR", "QUICK"):
        environment.pop(name, None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block.name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
