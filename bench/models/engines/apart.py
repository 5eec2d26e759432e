"""Start and memory of one engine, in a process of its own which imports what that engine needs.

The peak is the kernel's high-water mark of this process's own memory. ru_maxrss is not: a child
begins with that of its parent.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/models

from engines.batches import Batch, load, save
from engines.engine import Engine


def measure_apart(
    engine: Engine, folder: Path, masked: bool, threads: int, batch: Batch
) -> dict[str, Any]:
    """start_seconds: from a command to the first batch's result. peak_memory_bytes: up to there.

    Empty where the process fails, whose own words are then on stderr.
    """
    path = folder / "batch.npz"
    save(batch, path)
    job = {"name": engine.name, "kind": engine.kind, "folder": str(folder), "masked": masked}
    job |= {"threads": threads, "batch": str(path), "started": time.time()}
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, json.dumps(job)]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def main() -> None:
    from engines.registry import named

    job = json.loads(sys.argv[1])
    engine = named(job["name"], job["kind"])
    run = engine.open(Path(job["folder"]), job["masked"], job["threads"])
    run(load(Path(job["batch"])))
    seconds = time.time() - job["started"]
    print(json.dumps({"start_seconds": seconds, "peak_memory_bytes": high_water_mark()}))


def high_water_mark() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    return None if found is None else int(found[1]) * 1024


if __name__ == "__main__":
    main()
