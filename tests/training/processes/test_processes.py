"""clinattn train in processes of its own: Ctrl-C, and two that train as one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("pyarrow")

import runs  # noqa: E402
from patients import write_measured_patients, write_patients  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_checkpoint  # noqa: E402

SMALL = ["--max-tokens", "48", "--batch-tokens", "96"]
FAST = [*SMALL, "--steps", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return write_measured_patients(tmp_path_factory.mktemp("measured"))


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def started(*args, **env) -> subprocess.Popen:
    """Python with these arguments."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


def started_twice(*args) -> list[subprocess.Popen]:
    """Starts two processes in the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [started(*args, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    folder = write_patients(tmp_path / "meds")
    output = tmp_path / "out"
    options = ["train", "--meds-dir", folder, *SMALL, "--steps", "100000", "--output", output]
    process = started(runs.__file__, *options)
    deadline = time.monotonic() + 120
    while len(metrics(output)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    said = " ".join(said.split())
    assert "interrupted: --resume goes on from step" in said and "Traceback" not in said
    step = load_checkpoint(checkpoints(output)[-1])["step"]
    assert step == metrics(output)[-1]["step"] >= 3


GROUPS = {
    "tokens": [],
    "times": ["--preset", "timed-causal", "--task", "clm"],
    "pairs of values": ["--preset", "typed-valued", "--nsp"],
}


@pytest.mark.parametrize("kind", GROUPS)
def test_two_processes_train_as_one_does(measured, tmp_path, threads, small_presets, kind):
    """On gloo.

    fp64: only the order of sums differs, which Adam's division by tiny moments enlarges.
    """
    options = ["train", "--meds-dir", measured, *FAST, "--accumulate", "4", "--dtype", "float64"]
    options += GROUPS[kind]
    ranks = started_twice(runs.__file__, *options, "--output", tmp_path / "two")
    threads(1)
    one = [str(x) for x in (*options, "--output", tmp_path / "one")]
    assert CliRunner().invoke(app, one).exit_code == 0
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "wrote" in said[0] and said[1] == ""  # one rank speaks, writes and saves
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and a.get("tokens") == b.get("tokens")
        for name in a.keys() - {"split"} - runs.CLOCKED:
            assert a[name] == pytest.approx(b[name], rel=1e-9), name
    one, two = (load_checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("one", "two"))
    assert (one["epoch"], one["place"]) == (two["epoch"], two["place"])
    for name, weight in one["model"].items():
        torch.testing.assert_close(weight, two["model"][name], rtol=0, atol=1e-8)


ENDED = """
import weakref
import torch
import torch.distributed as dist
from clinattn.training.ranks import joined

with joined("cpu") as (ranks, device):
    import torch._dynamo  # as the first step of an optimiser does
    group = weakref.ref(dist.group.WORLD)
    assert ranks.sum(torch.ones(1, device=device)) == 2 and group() is not None
assert group() is None
"""


def test_a_group_ends_with_its_run():
    """A thread of it that still holds a tensor when the interpreter ends aborts the process."""
    ranks = started_twice("-c", ENDED)
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
