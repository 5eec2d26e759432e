"""Thirty million events: the memory of each process, and the same figures by another way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from places import BENCH

pa = pytest.importorskip("pyarrow")
for package in ("filelock", "typer", "rich"):
    pytest.importorskip(package)

import preparing  # noqa: E402

from clinattn.workloads.store.reading import store_source  # noqa: E402

EVENTS = 30_000_000
MOST = 1_500_000_000  # bytes of a process

READ = """
import sys
from pathlib import Path

import numpy as np
from clinattn.workloads import open_source

source = open_source(f"meds:{sys.argv[1]}")
order = np.random.default_rng(0).permutation(len(source))
counts, timed, values = np.zeros(len(source.vocabulary), np.int64), 0, 0.0
for index in order.tolist():
    begin, start, end = source.bounds(index)
    counts += np.bincount(source.ids[begin:end], minlength=len(counts))
    timed += int((np.diff(source.times[start:end]) >= 0).all())
    values += float(np.nansum(source.values[begin:end], dtype=np.float64))
status = Path("/proc/self/status").read_text()  # ru_maxrss begins with that of the parent
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(peak, timed == len(source), values, *counts[5:])
"""


def peak_of(pid: int) -> int:
    """The most memory that a running process has had, in bytes; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else 0


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    root = tmp_path_factory.mktemp("meds") / "ward"
    script = BENCH / "made_timelines.py"
    given = [root, "--events", str(EVENTS), "--files", "10"]
    subprocess.run([sys.executable, script, *given], check=True)
    return root


def test_memory_stays_bounded_and_nothing_is_lost(ward, tmp_path):
    folder, peaks = tmp_path / "store", {}
    command = [sys.executable, "-m", "clinattn", "prepare", "--data", f"meds:{ward}"]
    with subprocess.Popen([*command, "--output", folder, "--processes", "2"]) as process:
        while process.poll() is None:
            for pid in (process.pid, *preparing.children(process.pid)):
                peaks[pid] = max(peaks.get(pid, 0), peak_of(pid))
            time.sleep(0.1)
    assert process.returncode == 0
    assert len([peak for peak in peaks.values() if peak > 10**8]) == 3  # it, and two that work
    assert max(peaks.values()) < MOST

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, folder], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    peak, in_order, values, *counts = done.stdout.split()
    assert int(peak) < MOST and in_order == "True"

    import pyarrow.dataset as ds

    table = ds.dataset(ward / "data", format="parquet").to_table(columns=["code", "numeric_value"])
    by_code = table["code"].cast(pa.string()).value_counts().to_pylist()
    found = {x["values"]: x["counts"] for x in by_code}
    tokens = store_source(folder).vocabulary.tokens[5:]
    assert dict(zip(tokens, map(int, counts), strict=True)) == found
    numbers = table["numeric_value"].to_numpy().astype(np.float64)
    bound = 2 * EVENTS * np.finfo(np.float64).eps * np.nansum(np.abs(numbers))
    assert abs(float(values) - np.nansum(numbers)) < bound
