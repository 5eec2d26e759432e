"""clinattn prepare: what it says, and how its timelines serve other commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

for package in ("pyarrow", "rich", "typer", "filelock"):
    pytest.importorskip(package)

import stores  # noqa: E402
from patients import write_measured_patients  # noqa: E402
from predicted import bits_of, trained  # noqa: E402
from runs import assert_same_bits  # noqa: E402
from terminal import flat  # noqa: E402

from clinattn.tools import prepare as command  # noqa: E402
from clinattn.workloads import timelines  # noqa: E402
from clinattn.workloads.store import prepare  # noqa: E402

TRAIN = ["train", "--preset", "timed-valued", "--max-tokens", "48", "--batch-tokens", "96"]
TRAIN += ["--steps", "2", "--threads", "1"]


@pytest.fixture
def ward(tmp_path):
    return write_measured_patients(tmp_path / "ward", patients=12)


def test_it_says_what_it_wrote_and_how_to_open_it(cli, ward):
    done = cli("prepare", "--data", f"meds:{ward}", "--output", "timelines")
    assert done.exit_code == 0, done.output
    events = len(stores.store_source(ward.parent / "timelines").ids)
    told = f"timelines: {events:,} events of 12 patients; --data meds:timelines opens them"
    assert flat(done.stdout) == f"wrote {told}"
    stages = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert stages == ["reading codes and patients", "writing timelines"]
    again = cli("prepare", "--data", f"meds:{ward}", "--output", "timelines")
    assert flat(again.stdout) == f"nothing to do: these timelines are whole in {told}"
    assert again.exit_code == 0 and not again.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "data=None: expected meds:DIR, a MEDS folder"),
        (["--data", "text:x.csv"], "data='text:x.csv': expected meds:DIR, a MEDS folder"),
        (["--data", "meds:"], "data='meds:': expected meds:DIR"),
        (["--data", "meds:ward"], "output: got none, expected a folder for the timelines"),
        (["--data", "meds:ward", "--output", "x", "--processes", "0"], "processes=0: expected at"),
        (["--data", "meds:absent", "--output", "x"], "meds_dir='absent' does not exist"),
        (["--data", "meds:ward", "--output", "ward"], "output='ward' holds data: expected a new"),
        (["--data", "meds:ward", "--output", "file"], "output='file' is a file: expected a folder"),
        (["--data", "meds:done", "--output", "x"], "meds_dir='done' holds timelines already"),
    ],
)
def test_what_cannot_be_done_is_a_line_and_leaves_nothing(cli, ward, tmp_path, given, message):
    (tmp_path / "file").write_text("x")
    prepare.prepare(ward, tmp_path / "done", 1)
    done = cli("prepare", *given)
    assert done.exit_code == 2 and message in flat(done.stderr), done.output
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "x").exists()


def test_another_run_in_the_folder_is_a_line(cli, ward):
    hold = "import sys; from pathlib import Path; from clinattn.files.claims import claimed\n"
    hold += "with claimed(Path('out')): print('in', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], text=True, **pipes) as process:
        assert process.stdout.readline() == "in\n"
        done = cli("prepare", "--data", f"meds:{ward}", "--output", "out")
        process.communicate()
    assert done.exit_code == 2 and "output='out': another run is in it" in flat(done.stderr)


def test_as_many_processes_as_cpus_unless_another_number_is_asked_for(cli, ward, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(command, "cpus", lambda: type("C", (), {"useful": 5}))
    real = prepare.prepare
    monkeypatch.setattr(
        prepare, "prepare", lambda *given: asked.append(given[2]) or real(*given[:2], 1)
    )
    assert cli("prepare", "--data", f"meds:{ward}", "--output", "a").exit_code == 0
    given = ["--data", f"meds:{ward}", "--output", "b", "--processes", "3"]
    assert cli("prepare", *given).exit_code == 0
    assert asked == [5, 3]


def test_a_model_says_the_same_of_timelines_and_of_their_folder(
    cli, ward, tmp_path, small_presets, threads
):
    threads(1)
    stores.made(ward, tmp_path / "timelines", 200)
    path = trained(tmp_path / "run", preset="valued", meds_dir=ward, cuts=2)[1]
    patient = stores.store_source(tmp_path / "timelines").subjects[7]
    for data in ("ward", "timelines"):
        given = [path, "--data", f"meds:{data}"]
        done = cli("predict", *given, "--split", "all", "--output", f"{data}.parquet")
        assert done.exit_code == 0, done.output
        done = cli("explain", *given, "--patient", patient, "--json", f"{data}.json")
        assert done.exit_code == 0, done.output
        done = cli("evaluate", f"{data}.parquet", "--by", "STEP//1*", "--data", f"meds:{data}",
                   "--resamples", "100", "--json", f"{data}-evaluated.json")  # fmt: skip
        assert done.exit_code == 0, done.output
    assert bits_of(tmp_path / "ward.parquet").equals(bits_of(tmp_path / "timelines.parquet"))
    for name in ("{}.json", "{}-evaluated.json"):
        one, other = (
            (tmp_path / name.format(data)).read_text().replace(data, "DATA")
            for data in ("ward", "timelines")
        )
        assert json.loads(one).keys() == json.loads(other).keys() and len(one) > 500
        assert figures(json.loads(one)) == figures(json.loads(other))


def figures(found) -> list[float]:
    """Returns the numbers in a JSON file, in their order."""
    if isinstance(found, (list, dict)):
        items = found.values() if isinstance(found, dict) else found
        return [x for item in items for x in figures(item)]
    return [found] if isinstance(found, (int, float)) else []


def test_training_on_a_large_folder_keeps_its_timelines_beside_the_checkpoints(
    cli, ward, tmp_path, small_presets, monkeypatch
):
    data = ["--data", f"meds:{ward}"]
    assert cli(*TRAIN, *data, "--output", "small").exit_code == 0
    monkeypatch.setattr(timelines, "IN_MEMORY", 100)
    with stores.cut_finely(10**6):
        done = cli(*TRAIN, *data, "--output", "large")
    assert done.exit_code == 0, done.output
    assert "events are more than are read into memory: their timelines are kept in large/tim" in (
        flat(done.stderr)
    )
    assert_same_bits("small", "large")
    before = stores.contents(tmp_path / "large" / "timelines")
    done = cli(*TRAIN, *data, "--output", "large", "--resume")
    assert done.exit_code == 0, done.output
    assert stores.contents(tmp_path / "large" / "timelines") == before
    assert not (tmp_path / "small" / "timelines").exists()


def test_training_on_timelines_is_training_on_their_folder(cli, ward, small_presets):
    assert cli("prepare", "--data", f"meds:{ward}", "--output", "timelines").exit_code == 0
    for data, output in ((ward, "a"), ("timelines", "b")):
        done = cli(*TRAIN, "--data", f"meds:{data}", "--output", output)
        assert done.exit_code == 0, done.output
    assert_same_bits("a", "b")
