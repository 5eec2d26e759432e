"""Training runs of several processes under torchrun, and one of the processes of such a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import runs


class Launched:
    """torchrun with small runs; what each process says is in files of `logs`."""

    def __init__(self, world: int, logs: Path, *args, restarts: int = 0):
        self.logs, self.output = logs, Path(args[args.index("--output") + 1])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", world, "--max-restarts", restarts]
        command += ["--redirects", 3, "--log-dir", logs, runs.__file__, "train", *args]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [str(x) for x in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=env,
        )  # fmt: skip

    def until(self, step: int) -> None:
        """Comes back when the metrics have the step, or when the run has ended."""
        path, deadline = self.output / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            lines = path.read_text().splitlines() if path.exists() else []
            if any(json.loads(x)["step"] >= step for x in lines if x.endswith("}")):
                return
            time.sleep(0.01)

    def kill(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to the process of a rank, once."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                os.kill(int(child), number)

    def ended(self) -> tuple[int, str]:
        """The status of torchrun, and what all processes have said on stderr."""
        try:
            self.process.communicate(timeout=180)
        finally:
            self.process.kill()
        said = [path.read_text() for path in sorted(self.logs.glob("**/stderr.log"))]
        return self.process.returncode, "\n".join(said)


def run(world: int, logs: Path, *args) -> str:
    """A run to its end; returns what its processes have said. One process goes without torchrun."""
    if world > 1:
        status, said = Launched(world, logs, *args).ended()
    else:
        command = [sys.executable, runs.__file__, "train", *map(str, args)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
        status, said = done.returncode, done.stderr
    assert status == 0, said
    return said
