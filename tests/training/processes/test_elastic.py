"""Processes that are killed under torchrun: one line, and the same bits when the run goes on."""

from __future__ import annotations

import random
import signal
import sys

import pytest
import torch
from needs import GLOO

pytest.importorskip("typer")
pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from runs import rows_of  # noqa: E402
from torchrun import Launched, run  # noqa: E402

from clinattn.training.checkpoint import checkpoints, load_checkpoint  # noqa: E402

pytestmark = [
    GLOO,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]
STEPS = 30
ENGINES = {"2": (2, ()), "2-shards": (2, ("--shard",)), "4": (4, ())}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = write_patients(tmp_path_factory.mktemp("meds"))
    small = ["--max-tokens", 48, "--batch-tokens", 96, "--accumulate", 4, "--threads", 1]
    often = ["--steps", STEPS, "--save-every", 7, "--eval-every", 20]
    return ["--meds-dir", folder, *small, *often]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options):
    """The folder of a run that nothing has disturbed, by engine."""
    made = {}

    def of(engine):
        if engine not in made:
            folder, (world, extra) = tmp_path_factory.mktemp("whole"), ENGINES[engine]
            run(world, folder / "logs", *options, *extra, "--output", folder / "out")
            made[engine] = folder / "out"
        return made[engine]

    return of


def assert_same(one, two):
    a, b = (load_checkpoint(checkpoints(output)[-1]) for output in (one, two))
    assert a["step"] == b["step"] == STEPS and rows_of(one) == rows_of(two)
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name


@pytest.mark.parametrize("engine", ["2-shards", "4"])
def test_torchrun_restarts_a_killed_run_which_goes_on_by_itself(engine, options, whole, tmp_path):
    """A SIGKILL at a random step: before or after a checkpoint, in a step or while one is saved."""
    world, extra = ENGINES[engine]
    draw = random.Random(f"restart {engine}")
    step, rank = draw.randrange(1, STEPS - 8), draw.randrange(world)
    output = tmp_path / "out"
    launched = Launched(world, tmp_path / "logs", *options, *extra, "--output", output, restarts=1)
    launched.until(step)
    launched.kill(rank, signal.SIGKILL)
    status, said = launched.ended()
    assert status == 0, said
    assert said.count("reading sequences") == 2 and "Traceback" not in said
    assert_same(output, whole(engine))


def test_a_killed_process_ends_the_run_with_one_line(options, whole, tmp_path):
    output = tmp_path / "out"
    launched = Launched(2, tmp_path / "logs", *options, "--output", output)
    launched.until(10)
    launched.kill(0, signal.SIGKILL)
    status, said = launched.ended()
    newest = checkpoints(output)[-1].name
    assert status == 1 and "Traceback" not in said
    assert [line for line in said.splitlines() if "error" in line] == [
        "error: another process of this run has ended, or cannot be reached: --resume goes on from "
        + newest
    ]
    run(2, tmp_path / "again", *options, "--output", output, "--resume")
    assert_same(output, whole("2"))


def test_sigterm_to_torchrun_saves(options, whole, tmp_path):
    """As Slurm ends a job."""
    output = tmp_path / "out"
    launched = Launched(2, tmp_path / "logs", *options, "--output", output)
    launched.until(10)
    launched.process.send_signal(signal.SIGTERM)
    _, said = launched.ended()
    step = rows_of(output)[-1]["step"]
    assert f"interrupted: --resume goes on from step {step}" in " ".join(said.split())
    assert "Traceback" not in said and checkpoints(output)[-1].name == f"step-{step:08d}.pt"
    run(2, tmp_path / "again", *options, "--output", output, "--resume")
    assert_same(output, whole("2"))
