"""bench/gpu.py, which needs a GPU, walked through in Triton's interpreter."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"
STAGES = (
    "environment numerics shapes race capture sync overhead memory speed clinical sanitizer flex "
    "targets tiles"
).split()
# Python imports this module by itself in every process, those that the script starts included.
WRONG_RESULTS = """
from clinattn.kernels import forward
right = forward.attention_forward
def wrong(*args):
    o, lse = right(*args)
    return 1.1 * o, lse
forward.attention_forward = wrong
"""
CRASHING = """
import os
def perform(job, device):
    if job == 2:
        os._exit(7)
    return {"ok": True}
"""


def dry_run(folder, *arguments, **settings):
    """(exit code, rows, output)"""
    keep = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    keep |= {"CLINATTN_GPU_DRYRUN": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=keep | {"OUT": str(folder)} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (file,) = folder.glob("gpu-dryrun-*.jsonl")
    return done.returncode, [json.loads(x) for x in file.read_text().splitlines()], done.stdout


def test_every_stage_writes_rows(tmp_path):
    code, rows, output = dry_run(tmp_path, "--commit", "abc")
    assert code == 0, output
    assert list(dict.fromkeys(row["stage"] for row in rows)) == STAGES
    assert all(row["commit"] == "abc" and row["torch"] for row in rows)
    assert not [row for row in rows if row.get("ok") is False]
    for stage in STAGES[1:]:
        results = [row for row in rows if row["stage"] == stage and "took_s" not in row]
        assert results, f"{stage} wrote no row"
    packed_and_padded = {"clinattn-packed", "clinattn-mask", "clinattn-lengths"}
    assert packed_and_padded <= {row.get("provider") for row in rows}
    assert all("met" in row for row in rows if "target" in row)


def test_wrong_results_end_in_failure(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WRONG_RESULTS)
    stages = ("numerics", "shapes", "speed")
    code, rows, output = dry_run(tmp_path, *stages, PYTHONPATH=str(tmp_path))
    assert code == 1, output
    for stage in stages:
        assert any(row.get("ok") is False for row in rows if row["stage"] == stage), stage


def test_an_unknown_stage_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "nonesuch"],
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "none of numerics" in done.stderr


def test_a_crash_costs_one_job(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = importlib.import_module("gpu_jobs")
    run = SimpleNamespace(dryrun=True, device="cpu")
    ((rows, left),) = jobs.in_processes("crashing:perform", [1, 2, 3], run, 60)
    assert [(row["job"], row["ok"]) for row in rows] == [(1, True), (2, False), (3, True)]
    assert "exit 7" in rows[1]["error"] and not left
