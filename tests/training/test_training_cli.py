"""clinattn train as a command: its lines, its exit codes, Ctrl-C, and two processes."""

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

from clinattn.cli import app  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_checkpoint  # noqa: E402

FAST = ["--max-tokens", "48", "--batch-tokens", "96", "--steps", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("meds"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return write_measured_patients(tmp_path_factory.mktemp("measured"))


@pytest.fixture
def cli(tmp_path, monkeypatch, threads):
    """Run a command in an empty folder, with no MEDS folder in the environment."""
    threads(1)
    for name in ("MEDS_DIR", "CLINATTN_MEDS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *args, **env: CliRunner().invoke(app, [str(arg) for arg in args], env=env)


def flat(text: str) -> str:
    """Without the line breaks that rich puts in."""
    return " ".join(text.split())


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def started(*args, **env) -> subprocess.Popen:
    """Python with these arguments."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


def started_twice(*args) -> list[subprocess.Popen]:
    """In the environment of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [started(*args, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]


def test_a_run_says_what_it_reads_and_how_it_goes(cli, folder, tmp_path):
    done = cli("train", "--meds-dir", folder, *FAST)
    assert done.exit_code == 0, done.output
    said = flat(done.stderr)
    assert "40 patients" in said and "held out; tiny" in said
    assert "step 0: held-out loss" in said and "step 3: held-out loss" in said
    assert "unigram entropy" in said and done.stdout == ""
    assert "wrote train/out/metrics.jsonl and checkpoints up to step 3" in said
    again = cli("train", "--meds-dir", folder, *FAST)
    assert again.exit_code == 2 and "expected resume, or another folder" in flat(again.stderr)
    assert cli("train", "--meds-dir", folder, *FAST, "--resume").exit_code == 0


def test_a_classifier_is_held_against_the_base_rate(cli, folder):
    labels = ["--task", "classify", "--label-code", "ALARM*", "--output", "o"]
    done = cli("train", *labels, *FAST, MEDS_DIR=str(folder))
    assert done.exit_code == 0, done.output
    for name in ("accuracy", "base rate", "auroc"):
        assert name in flat(done.stderr)


def test_pairs_are_held_against_the_base_rate(cli, folder):
    done = cli("train", "--meds-dir", folder, "--nsp", *FAST)
    assert done.exit_code == 0, done.output
    assert "nsp accuracy" in flat(done.stderr) and "nsp base rate" in flat(done.stderr)


def test_a_text_file_wins_over_the_environment(cli, folder, tmp_path):
    rows = [{"text": f"note {i % 7} of {i % 3}", "subject_id": i} for i in range(60)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = cli("train", "--text", "notes.jsonl", *FAST, MEDS_DIR=str(folder))
    assert done.exit_code == 0 and "notes.jsonl, 60 rows" in flat(done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "meds_dir and text_file: got neither, expected exactly one of them"),
        (["--meds-dir", "absent"], "meds_dir='absent' does not exist: expected a MEDS folder"),
        (["--meds-dir", ".", "--text", "a.csv"], "got both, expected exactly one of them"),
        (["--text", "absent.csv"], "text_file='absent.csv' cannot be read"),
        (["--meds-dir", ".", "--task", "nsp"], "task='nsp': expected one of"),
        (["--meds-dir", ".", "--task", "classify"], "label_code=None for task='classify'"),
        (["--meds-dir", ".", "--preset", "bert"], "preset='bert': expected one of"),
        (["--meds-dir", ".", "--nsp", "--task", "clm"], "nsp=True: expected False for task='clm'"),
        (["--text", "a.csv", "--preset", "clmbr"], "preset='clmbr' asks for times, which text_fil"),
        (["--meds-dir", ".", "--steps", "0"], "steps=0: expected at least 1"),
        (["--meds-dir", ".", "--resume"], "resume: output='train/out' holds no checkpoint"),
        (["--meds-dir", ".", "--init", "no.pt"], "checkpoint 'no.pt' cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_a_clear_line_and_no_folder(cli, tmp_path, options, message):
    done = cli("train", *options)
    assert done.exit_code == 2 and message in flat(done.stderr), done.output
    assert "Traceback" not in done.output and not (tmp_path / "train").exists()


def test_ctrl_c_saves_and_resume_goes_on(folder, tmp_path):
    output = tmp_path / "out"
    options = ["train", "--meds-dir", folder, *FAST[:-4], "--steps", "100000", "--output", output]
    process = started(runs.__file__, *options)
    deadline = time.monotonic() + 120
    while len(metrics(output)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted: --resume goes on from step" in flat(said) and "Traceback" not in said
    step = load_checkpoint(checkpoints(output)[-1])["step"]
    assert step == metrics(output)[-1]["step"] >= 3


GROUPS = {
    "tokens": [],
    "times": ["--preset", "timed-causal", "--task", "clm"],
    "pairs of values": ["--preset", "typed-valued", "--nsp"],
}


@pytest.mark.parametrize("kind", GROUPS)
def test_two_processes_train_as_one_does(cli, measured, tmp_path, small_presets, kind):
    """On gloo.

    fp64: only the order of sums differs, which Adam's division by tiny moments enlarges.
    """
    options = ["train", "--meds-dir", measured, *FAST, "--accumulate", "4", "--dtype", "float64"]
    options += GROUPS[kind]
    ranks = started_twice(runs.__file__, *options, "--output", tmp_path / "two")
    assert cli(*options, "--output", "one").exit_code == 0
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "wrote" in said[0] and said[1] == ""  # one rank speaks, writes and saves
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and a.get("tokens") == b.get("tokens")
        for name in a.keys() - {"split", "tokens_per_s"}:
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


def test_accumulation_is_shared_out_evenly(folder, tmp_path):
    from clinattn.training.loop import Trainer
    from clinattn.training.ranks import Ranks
    from clinattn.training.settings import Settings

    settings = Settings(meds_dir=folder, output=tmp_path, accumulate=3)
    with pytest.raises(ValueError, match="accumulate=3: expected a multiple of the 2 ranks"):
        Trainer(settings, Ranks(1, 2))
