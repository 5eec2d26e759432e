"""Whole runs of clinattn bench: where sequences come from, and what has to be installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

for package in ("typer", "rich", "pyarrow", "matplotlib"):
    pytest.importorskip(package)

FAST = ["--max-tokens", "48", "--sequences", "4", "--batch-size", "2", "--rounds", "1"]


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
def test_a_missing_package_is_named_before_the_work(package, meds):
    blocked = f"import sys; sys.modules[{package!r}] = None; from clinattn.tools.cli import app; "
    run = f"app(['doctor'], standalone_mode=False); app(['bench', '--data', 'meds:{meds}'])"
    done = subprocess.run(
        [sys.executable, "-c", blocked + run],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert done.returncode == 2 and "usable" in done.stdout
    said = " ".join(done.stderr.split())
    assert f"error: {package} is not installed: pip install 'clinattn[bench]'" in said
