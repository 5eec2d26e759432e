"""Faults of file systems and of files: a line and status 2, whatever the command.

A limit on the size of files stands for a full disk.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from limits import largest_file
from results import ENCODER

for package in ("typer", "rich", "pyarrow", "matplotlib", "jinja2"):
    pytest.importorskip(package)

from patients import write_patients  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from clinattn.tools import doctor as diagnosis  # noqa: E402
from clinattn.tools.cli import app  # noqa: E402

SMALL = ["--max-tokens", "48", "--batch-size", "2"]
BENCH = ["bench", *SMALL, "--profile", "fixed", "--sequences", "2", "--rounds", "1"]
BENCH += ["--modes", "infer"]
PROFILE = ["profile", *SMALL, "--steps", "1", "--mode", "infer"]
TRAIN = ["train", "--max-tokens", "48", "--batch-tokens", "96", "--steps", "1", "--threads", "1"]
PAGE = ["report", "good.json"]


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("meds"))


@pytest.fixture
def cli(tmp_path, monkeypatch, threads, small_presets):
    """Run a command in a folder that holds a few files, with no MEDS folder in the environment."""
    threads(1)
    for name in ("MEDS_DIR", "CLINATTN_MEDS_DIR", "QUICK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.json").write_text(json.dumps(ENCODER))
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "folder.jsonl").mkdir()
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


def assert_one_line(done, message: str) -> None:
    assert done.exit_code == 2, (done.output, done.exception)
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", [BENCH, PROFILE, TRAIN], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "output='file' is a file: expected a folder"),
        ("file/x/y", "file', which is a file: expected a folder"),
        ("/proc/x", "output='/proc/x': "),
    ],
)
def test_an_output_that_is_no_folder_is_named_before_the_work(
    cli, patients, command, output, message
):
    meds = ["--meds-dir", patients] if command is TRAIN else []
    done = cli(*command, *meds, "--output", output)
    assert_one_line(done, message)
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_a_result_that_cannot_be_written_is_named_before_the_work(cli, tmp_path):
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    done = cli(*BENCH, "--output", "out")
    assert_one_line(done, "output='out/results.json' is a folder: expected a file")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*PAGE, "--output", "absent/x.html"], "'absent' is no folder: expected one"),
        ([*PAGE, "--output", "folder"], "output='folder' is a folder: expected a file"),
        ([*PAGE, "--output", "file/x"], "'file' is no folder: expected one"),
        ([*PAGE, "--output", "/dev/full"], "/dev/full: No space left on device"),
        (["report", "folder"], "results='folder' cannot be read (Is a directory)"),
        (["report", "binary.jsonl"], "binary.jsonl' cannot be read (Expecting value"),
        (["report", "deep.jsonl"], "cannot be read (nested deeper than 64 levels)"),
        (["report", "good.json", "file"], "results='file' cannot be read (Expecting value"),
        ([*TRAIN, "--text", "binary.jsonl"], "text_file='binary.jsonl' "),
        ([*TRAIN, "--text", "folder.jsonl"], "'folder.jsonl' cannot be read: [Errno 21]"),
        ([*TRAIN, "--text", "deep.jsonl"], "'deep.jsonl' line 1: nested deeper than 64 levels"),
        ([*TRAIN, "--meds-dir", "file"], "meds_dir='file' is a file: expected a MEDS folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_file_that_cannot_serve_is_named(cli, tmp_path, options, message):
    assert_one_line(cli(*options), message)
    assert not (tmp_path / "train").exists() and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "init='folder' holds neither step-*.pt nor config.json: expected"),
        ("absent.pt", "checkpoint 'absent.pt' cannot be read: No such file"),
        ("file", "checkpoint 'file' cannot be read: it is damaged, or none of clinattn train"),
        ("good.json", "checkpoint 'good.json' cannot be read: it is damaged, or none"),
    ],
)
def test_an_init_that_is_no_checkpoint_is_named(cli, patients, tmp_path, name, message):
    assert_one_line(cli(*TRAIN, "--meds-dir", patients, "--init", name), message)
    assert not (tmp_path / "train").exists()


def test_a_full_disk_ends_a_run_and_names_the_file(cli, patients, tmp_path):
    with largest_file(30_000):
        done = cli(*TRAIN, "--meds-dir", patients, "--output", "out")
    assert_one_line(done, "out/step-00000001.pt: File too large")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"metrics.jsonl", ".lock"}


def test_a_full_disk_leaves_the_page_that_was_there(cli, tmp_path):
    (tmp_path / "x.html").write_text("before")
    with largest_file(4_000):
        assert_one_line(cli(*PAGE, "--output", "x.html"), "x.html: File too large")
    assert (tmp_path / "x.html").read_text() == "before"
    assert not list(tmp_path.glob(".x*"))


def test_what_was_measured_is_printed_where_it_cannot_be_written(cli):
    with largest_file(3_000):
        done = cli(*BENCH, "--output", "out")
    assert_one_line(done, "out/results.json: File too large")
    assert "round 1: infer, clinattn, packed: " in done.stderr
    assert "times by packing alone (clinattn, packed, over clinattn, padded)" in done.stdout


def test_what_was_measured_is_written_where_it_cannot_be_printed(cli, tmp_path, monkeypatch):
    def full(result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clinattn.tools.cli.show", full)
    assert_one_line(cli(*BENCH, "--output", "out"), "standard output: No space left on device")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"]


def test_time_that_is_over_has_a_line(cli, tmp_path):
    done = cli(*BENCH, "--budget", "0.0001", "--output", "out")
    assert done.exit_code == 1 and "the 0.0001 s were over before all was measured" in done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["time_over"]


def test_names_are_no_markup(cli):
    done = cli(*PAGE, "--output", "a [red]b :tada:.html")
    assert done.exit_code == 0 and "wrote a [red]b :tada:.html" in done.stdout
    done = cli("report", "absent[/x].json")
    assert_one_line(done, "results='absent[/x].json'")


def test_a_folder_is_of_one_run(cli, patients, tmp_path):
    hold = "import sys; from pathlib import Path; from clinattn.files.claims import claimed\n"
    hold += "with claimed(Path('out')): print('in', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], text=True, **pipes) as process:
        assert process.stdout.readline() == "in\n"
        done = cli(*TRAIN, "--meds-dir", patients, "--output", "out")
        process.communicate()
    assert_one_line(done, "output='out': another run is in it: expected one at a time")
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_has_a_line(cli, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnosis, "diagnose", interrupted)
    done = cli("doctor")
    assert done.exit_code == 130 and done.stderr == "interrupted\n"


def test_an_error_of_the_program_is_none_of_the_outside(cli, monkeypatch):
    monkeypatch.setattr(diagnosis, "diagnose", lambda: {}["absent"])
    assert isinstance(cli("doctor").exception, KeyError)


@pytest.mark.parametrize("options", [["doctor", "--json"], ["--help"]], ids=" ".join)
def test_a_full_standard_output_has_a_line(options):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "clinattn", *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output: No space left on device\n",
    )
