"""clinattn prepare in several processes, which are killed, interrupted and gone on with."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

pa = pytest.importorskip("pyarrow")
for package in ("filelock", "typer", "rich"):
    pytest.importorskip(package)

import preparing  # noqa: E402
import stores  # noqa: E402

PIECE = 12_000  # events
EVENTS = 400_000
KILLS = 5


@pytest.fixture(scope="module")
def ward(tmp_path_factory, bench_on_the_path):
    import made_timelines

    root = tmp_path_factory.mktemp("meds") / "ward"
    made_timelines.write(root, EVENTS, 7, seed=3)
    table = pa.parquet.read_table(root / "data" / "train" / "0.parquet")
    stores.write(root, {"train/0.parquet": stores.shuffled(table)}, row_group_size=5_000)
    return root


@pytest.fixture(scope="module")
def whole(ward, tmp_path_factory):
    """The bytes of a store that one process has made at once."""
    return stores.contents(stores.made(ward, tmp_path_factory.mktemp("whole") / "store", PIECE))


def prepare(ward, folder, processes=2):
    given = ["prepare", "--data", f"meds:{ward}", "--output", folder, "--processes", processes]
    return preparing.started(PIECE, *given)


def until(process, there):
    """Waits until something is there, or a process has ended."""
    while not there() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_bytes(tmp_path, ward, whole, processes):
    with prepare(ward, tmp_path / "store", processes) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert stores.contents(tmp_path / "store") == whole and len(whole) > 30
    assert f"{EVENTS:,} events of " in out.replace("\n", " ")


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path, ward, whole, seed):
    """Killed again and again, at random moments after its first file, until it comes through."""
    rng, folder, kills = random.Random(seed), tmp_path / "store", 0
    while True:
        with prepare(ward, folder, 1 + seed % 2) as process:
            before = len(list(folder.rglob("*")))
            until(process, lambda: len(list(folder.rglob("*"))) > before)  # noqa: B023
            held = preparing.children(process.pid)
            time.sleep(rng.uniform(0, 0.6) * rng.random())
            kills += process.poll() is None and kills < KILLS
            if kills < KILLS:
                process.kill()
            process.communicate()
        assert preparing.all_ended(held), "a process outlives the one that began it"
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills and stores.contents(folder) == whole


def test_a_killed_worker_ends_the_run_with_a_line(tmp_path, ward, whole):
    folder = tmp_path / "store"
    with prepare(ward, folder) as process:
        until(process, lambda: list(folder.glob("events-*")))
        os.kill(preparing.workers(process.pid)[0], signal.SIGKILL)
        _, err = process.communicate()
    *stages, line = err.splitlines()
    assert process.returncode == 2 and "Traceback" not in err
    assert line.startswith("error: a process was ended from outside (status -9), perhaps for want")
    assert not list(folder.rglob(".*.partial*"))
    with prepare(ward, folder) as process:
        assert process.communicate() and process.returncode == 0
    assert stores.contents(folder) == whole


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("moment", ["scan-*", "events-*"])
def test_ctrl_c_is_one_line(tmp_path, ward, whole, processes, moment):
    folder = tmp_path / "store"
    with prepare(ward, folder, processes) as process:
        until(process, lambda: list(folder.rglob(moment)))
        held = preparing.children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("[")] == ["interrupted"]
    assert not list(folder.rglob(".*.partial*")) and preparing.all_ended(held)
    with prepare(ward, folder, processes) as process:
        assert process.communicate() and process.returncode == 0
    assert stores.contents(folder) == whole


DEAF = """
import signal, sys
from pathlib import Path
from clinattn.workloads.store.processes import Workers

def tell(path):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    Path(path).write_text(str(signal.SIGINT in blocked))

if __name__ == "__main__":
    with Workers(2) as workers:
        workers.run(tell, [(path,) for path in sys.argv[1:]], lambda number: None)
"""


def test_every_worker_is_begun_deaf_to_ctrl_c(tmp_path):
    """The first one too, with which multiprocessing begins its tracker and unblocks signals."""
    (tmp_path / "deaf.py").write_text(DEAF)
    paths = [tmp_path / "one", tmp_path / "two"]
    subprocess.run([sys.executable, tmp_path / "deaf.py", *paths], check=True)
    assert [path.read_text() for path in paths] == ["True", "True"]


OPEN = """
import sys
from pathlib import Path
from clinattn.workloads import open_source, timelines
from clinattn.workloads.store import plan

timelines.IN_MEMORY, plan.EVENTS = 1000, int(sys.argv[3])
source = open_source(f"meds:{sys.argv[1]}", beside=Path(sys.argv[2]), say=print)
print(len(source.ids), int(source.times[-1]))
"""


def test_processes_that_open_a_large_folder_at_once_share_its_timelines(tmp_path, ward, whole):
    """As those of torchrun do: one makes them, and the others wait for it."""
    beside = tmp_path / "run" / "timelines"
    command = [sys.executable, "-c", OPEN, ward, beside, str(PIECE)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert said[0] == said[1] == said[2] and said[0][-1].startswith(f"{EVENTS} ")
    assert stores.contents(beside) == whole
