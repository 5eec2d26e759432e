"""The clinattn command, with stores in small pieces and processes for few events.

As a script: EVENTS of a piece, which is the rows of a scan too, and then the command.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def started(events: int, *given, **known) -> subprocess.Popen:
    """Starts a command in a process group of its own, as a terminal does."""
    command = [sys.executable, __file__, str(events), *map(str, given)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **known,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """The processes that a process has begun and that still run."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        found += [int(x) for x in (task / "children").read_text().split()]
    return found


def workers(pid: int) -> list[int]:
    """The children that do tasks, without the one that multiprocessing tidies up with."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(pid)}
    return [child for child, command in commands.items() if b"spawn_main" in command]


def all_ended(pids: list[int], seconds: float = 10) -> bool:
    """Returns whether processes end within some seconds."""
    deadline = time.monotonic() + seconds
    while any(map(_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(_running, pids))


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    from clinattn.tools.cli import app
    from clinattn.workloads.store import plan, prepare, scan

    plan.EVENTS = scan.ROWS = int(sys.argv.pop(1))
    prepare.WORTH = 1
    app()
