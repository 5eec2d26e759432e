"""The command line, through typer's own runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner  # noqa: E402

from clinattn.cli import app  # noqa: E402

FAST = ["--max-tokens", "48", "--sequences", "4", "--batch-size", "2", "--rounds", "1"]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run a command in an empty folder, with no MEDS folder in the environment."""
    for name in ("MEDS_DIR", "CLINATTN_MEDS_DIR", "QUICK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *args, **env: CliRunner().invoke(app, [str(arg) for arg in args], env=env)


@pytest.fixture
def meds(tmp_path):
    """A MEDS folder of five patients with 10 to 50 events."""
    rows = [(p, f"CODE//{(7 * p + e) % 11}") for p in range(1, 6) for e in range(10 * p)]
    subject, code = zip(*rows, strict=True)
    table = pa.table(
        {
            "subject_id": pa.array(subject, pa.int64()),
            "time": pa.array(range(len(rows)), pa.timestamp("us")),
            "code": code,
        }
    )
    folder = tmp_path / "my_meds"
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data" / "0.parquet")
    return folder


def flat(text: str) -> str:
    """Without the line breaks that rich puts in."""
    return " ".join(text.split())


def test_doctor_says_what_runs_and_why_not(cli):
    done = cli("doctor")
    assert done.exit_code == 0
    for name in ("torch", "threads", "triton", "cuda", "cpu", "reference", "usable"):
        assert name in done.stdout


def test_doctor_as_json(cli):
    found = json.loads(cli("doctor", "--json").stdout)
    assert set(found) == {
        *("environment", "backends", "notes", "compiled module", "compiler", "hints")
    }
    assert found["backends"]["reference"] == []
    assert found["environment"]["threads"] >= 1


def test_bench_writes_everything_and_prints_the_speedup(cli, meds, tmp_path):
    done = cli("bench", "--meds-dir", meds, "--output", "res", *FAST)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "res").iterdir()} >= {
        "results.json",
        "report.html",
        "throughput.png",
        "throughput.svg",
    }
    assert "train: clinattn packed runs" in done.stdout and "torch SDPA, padded" in done.stdout
    assert "round 1" in done.stderr and "round 1" not in done.stdout
    result = json.loads((tmp_path / "res" / "results.json").read_text())
    assert result["workload"]["source"] == "MEDS folder my_meds, 5 patients"
    assert result["workload"]["sequences"] == 4
    assert str(tmp_path) not in json.dumps(result)  # a result may be published


@pytest.mark.parametrize("variable", ["MEDS_DIR", "CLINATTN_MEDS_DIR"])
def test_bench_takes_the_folder_from_the_environment(cli, meds, variable):
    done = cli("bench", "--modes", "infer", *FAST, **{variable: str(meds)})
    assert done.exit_code == 0 and "5 patients" in done.stdout


def test_bench_falls_back_to_a_profile_and_a_profile_wins_over_the_environment(cli, meds):
    done = cli("bench", "--modes", "infer", *FAST, MEDS_DIR="", QUICK="")
    assert done.exit_code == 0 and "note_discharge" in done.stdout
    done = cli("bench", "--modes", "infer", "--profile", "fixed", *FAST, MEDS_DIR=str(meds))
    assert done.exit_code == 0 and "length profile fixed" in done.stdout


def test_bench_finds_the_demo_beside_the_project(cli, meds, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    demo = tmp_path / "shared" / "data" / "mimic-iv-demo-meds"
    demo.parent.mkdir(parents=True)
    meds.rename(demo)
    monkeypatch.chdir(project)
    done = cli("bench", "--modes", "infer", *FAST)
    assert done.exit_code == 0 and "MEDS folder mimic-iv-demo-meds" in done.stdout


def test_quick_spends_less_time(cli, tmp_path):
    options = ["--profile", "note_chunks", "--modes", "infer", "--sequences", "4", "--rounds", "1"]
    assert cli("bench", "--preset", "tiny", *options, QUICK="1").exit_code == 0
    settings = json.loads((tmp_path / "bench" / "out" / "results.json").read_text())["settings"]
    assert (settings["budget_s"], settings["max_tokens"]) == (45, 2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--meds-dir", "absent"], "meds_dir='absent' does not exist: expected a MEDS folder"),
        (["--meds-dir", "."], "meds_dir='.' has no data/**/*.parquet"),
        (["--profile", "icu"], "profile='icu' is unknown: expected one of"),
        (["--preset", "bert"], "preset 'bert' is unknown"),
        (["--modes", "train,tune"], "modes=('train', 'tune'): expected some of"),
        (["--dtype", "int8"], "dtype='int8': expected one of"),
        (["--device", "tpu"], "device='tpu': expected 'cpu' or 'cuda'"),
        (["--meds-dir", ".", "--profile", "fixed"], "were both given: expected one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_bench_arguments_end_with_a_clear_line(cli, options, message):
    done = cli("bench", *options)
    assert done.exit_code == 2
    assert message in flat(done.stderr) and "Traceback" not in done.output


def test_report_is_made_from_the_json_alone(cli, meds, tmp_path):
    cli("bench", "--meds-dir", meds, "--output", "res", "--modes", "infer", *FAST)
    written = (tmp_path / "res" / "report.html").read_text()
    (tmp_path / "res" / "results.json").rename(tmp_path / "moved.json")
    assert cli("report", "moved.json").exit_code == 0
    assert (tmp_path / "report.html").read_text() == written
    assert cli("report", "moved.json", "--output", "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text() == written


def test_report_of_garbage_ends_with_a_clear_line(cli, tmp_path):
    done = cli("report", "absent.json")
    assert done.exit_code == 2 and "results='absent.json' cannot be read" in flat(done.stderr)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_profile_writes_a_trace(cli, tmp_path, mode):
    done = cli(
        "profile", "--mode", mode, "--max-tokens", 40, "--batch-size", 2, "--steps", 1,
        "--output", "traces",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    trace = json.loads((tmp_path / "traces" / f"clinattn_packed-{mode}.trace.json").read_text())
    assert any("addmm" in event.get("name", "") or "mm" in event.get("name", "")
               for event in trace["traceEvents"])  # fmt: skip
    assert "Self CPU" in done.stdout
    passes = ("forward", "backward") if mode == "train" else ("forward",)
    for one in passes:
        assert f"layer 0 {one}" in done.stdout and f"attention {one}, " in done.stdout
    assert ("backward" in done.stdout) == (mode == "train")


def test_profile_names_a_wrong_variant(cli):
    done = cli("profile", "--variant", "eager")
    assert done.exit_code == 2 and "variant='eager': expected one of" in flat(done.stderr)


def test_python_m_clinattn(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "clinattn", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert done.returncode == 0
    for command in ("doctor", "bench", "report", "profile"):
        assert command in done.stdout


@pytest.mark.parametrize("package", ["pyarrow", "matplotlib", "jinja2"])
def test_a_missing_package_is_named_before_the_work(package):
    blocked = f"import sys; sys.modules[{package!r}] = None; from clinattn.cli import app; "
    done = subprocess.run(
        [sys.executable, "-c", blocked + "app(['doctor'], standalone_mode=False); app(['bench'])"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert done.returncode == 2 and "usable" in done.stdout
    assert f"error: {package} is not installed: pip install 'clinattn[bench]'" in flat(done.stderr)
