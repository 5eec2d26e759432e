"""bench/gpu/run.py, which needs a GPU, walked through on interpreted and emulated kernels."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from emulated import missing
from places import BENCH, LIB

pytest.importorskip("triton")
if reason := missing():
    pytest.skip(f"the CUDA kernels cannot be emulated: {reason}", allow_module_level=True)

SCRIPT = BENCH / "gpu" / "run.py"
STAGES = (
    "environment build ceilings speed clinical numerics encoder candidates bits race summaries "
    "capture sync overhead memory profile shapes numerics_rest sanitizer flex targets "
    "verification tiles"
).split()
OF_ONE = {"ceilings", "encoder", "candidates", "profile", "tiles"}  # not of each backend
BACKENDS = {"triton", "cuda"}
WAYS = ("forward", "both passes")
# Python imports these lines by itself in every process, those that the script starts included.
FASTER = "import interpreter_patches"
WRONG_RESULTS = """
import functools, importlib
backends = importlib.import_module("clinattn.backends.select")
load = backends._load
def wrong(name):
    right = load(name)
    def forward(*args):
        o, *rest = right.forward(*args)
        return 1.1 * o, *rest
    return right if name == "reference" else right._replace(forward=forward)
backends._load = functools.cache(wrong)
"""
# Packages of the extras that a machine with a torch of its own may lack
WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(("hypothesis", "matplotlib", "pytest", "rich", "typer")))
"""
SAME_SEED = """
import torch
torch.randint = lambda low, high, size, **keywords: torch.full(size, 5, **keywords)
"""
NO_COMPILER = """
import sys
if sys.orig_argv[-1].endswith("emulated.py"):
    raise SystemExit("no compiler here")
"""
SANITIZER = """#!/bin/sh
while [ "$1" != {python} ]; do [ "$1" = --tool ] && tool=$2; shift; done
"$@"
[ $tool = memcheck ] && echo "========= ERROR SUMMARY: 0 errors"
[ $tool = racecheck ] && echo "========= RACECHECK SUMMARY: {hazards} hazards displayed"
exit 0
"""
CRASHING = """
import os, sys
def perform(job, device):
    if job == 2:
        os._exit(7)
    if job == 4:  # as a kernel that takes the CUDA context down
        sys.modules["__main__"].device_answers = lambda device: False
    return {"ok": job != 4, "process": os.getpid()}
"""


def dry_run(folder, *arguments, patch="", **settings):
    """(exit code, rows, output), with a patch of Python code in all processes"""
    (folder / "sitecustomize.py").write_text(f"{FASTER}\n{patch}")
    path = os.pathsep.join(filter(None, [str(folder), str(LIB), os.environ.get("PYTHONPATH")]))
    dry = {"CLINATTN_GPU_DRYRUN": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    dry |= {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=os.environ | dry | {"OUT": str(folder)} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (file,) = folder.glob("gpu-dryrun-*.jsonl")
    return done.returncode, [json.loads(x) for x in file.read_text().splitlines()], done.stdout


def sanitizer(folder, hazards):
    """PATH with a tool that finds so many."""
    tool = folder / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable, hazards=hazards))
    tool.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_every_stage_writes_rows(tmp_path):
    tools = sanitizer(tmp_path, hazards=0)
    code, rows, output = dry_run(tmp_path, "--commit", "abc", patch=WITHOUT_EXTRAS, **tools)
    assert code == 0, output
    assert list(dict.fromkeys(row["stage"] for row in rows)) == STAGES
    assert all(row["commit"] == "abc" and row["torch"] for row in rows)
    assert not [row for row in rows if row.get("ok") is False]
    for stage in STAGES[1:]:
        of_stage = [row for row in rows if row["stage"] == stage]
        results = [row for row in of_stage if "took_s" not in row or "tool" in row]
        assert results, f"{stage} wrote no row"
        if stage not in OF_ONE:
            assert {row.get("backend") for row in results} >= BACKENDS, stage
    providers = {row.get("provider") for row in rows}
    for backend in BACKENDS:
        ways = {f"clinattn-{backend}-{way}" for way in ("packed", "mask", "lengths")}
        assert {f"clinattn-{backend}", *ways} <= providers
    assert all("met" in row for row in rows if "target" in row)
    tools = [row for row in rows if row["stage"] == "sanitizer" and "tool" in row]
    checked = {(row["backend"], row["tool"]) for row in tools if row["ok"]}
    assert checked == set(itertools.product(BACKENDS, ("none", "memcheck", "racecheck")))
    assert all(row["met"] for row in rows if row["stage"] == "verification" and "met" in row)


def test_wrong_results_end_in_failure(tmp_path):
    stages = ("build", "numerics", "shapes", "speed", "verification")
    code, rows, output = dry_run(tmp_path, *stages, patch=WRONG_RESULTS)
    assert code == 1, output
    for stage in ("numerics", "shapes"):
        failed = [row for row in rows if row["stage"] == stage and row.get("ok") is False]
        assert {row["backend"] for row in failed} == BACKENDS, stage
    assert any(row.get("ok") is False for row in rows if row["stage"] == "speed")
    verified = [row for row in rows if row["stage"] == "verification" and "met" in row]
    assert {row["backend"] for row in verified if not row["met"]} == BACKENDS


def test_a_hazard_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    stage = importlib.import_module("gpu.sanitizer")
    sanitizer(tmp_path, hazards=2)
    tool = str(tmp_path / "compute-sanitizer")
    row = stage.checked(tool, "racecheck", "triton", 0, 1, 60.0, "cpu")
    assert (row["ok"], row["result"]) == (False, "RACECHECK SUMMARY: 2 hazards displayed")
    verification = importlib.import_module("gpu.verification")
    found = list(verification.reasons_against("triton", [{"stage": "sanitizer", **row}]))
    assert "sanitizer: 1 failed" in found


def test_replays_that_drop_the_same_pairs_end_in_failure(tmp_path):
    code, rows, output = dry_run(tmp_path, "build", "capture", patch=SAME_SEED)
    assert code == 1, output
    failed = {(row["backend"], row["case"]) for row in rows if row.get("ok") is False}
    cases = [f"{call}dropout, {way}" for call in ("", "packed ") for way in WAYS]
    assert failed == {(backend, case) for backend in BACKENDS for case in cases}


def test_a_failed_build_costs_its_backend(tmp_path):
    code, rows, output = dry_run(tmp_path, "build", "memory", patch=NO_COMPILER)
    assert code == 1
    (failed,) = [row for row in rows if row.get("ok") is False]
    assert failed["backend"] == "cuda" and "no compiler here" in failed["error"], output
    assert {row["backend"] for row in rows if row["stage"] == "memory" and "case" in row} == {
        "triton"
    }


def test_a_run_goes_on_with_what_the_one_before_built(tmp_path):
    code, before, output = dry_run(tmp_path, "build")
    assert code == 0, output
    (file,) = tmp_path.glob("gpu-dryrun-*.jsonl")
    code, rows, output = dry_run(tmp_path, "--append", str(file), "memory")
    assert code == 0 and rows[: len(before)] == before, output
    assert not [row for row in rows if "skipped" in row]
    of_stage = [row for row in rows if row["stage"] == "memory" and "case" in row]
    assert {row["backend"] for row in of_stage} == BACKENDS


def test_an_unknown_stage_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "nonesuch"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "none of build" in done.stderr


def test_a_crash_costs_one_job(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    jobs = importlib.import_module("gpu.jobs")
    run = SimpleNamespace(dryrun=True, device="cpu")
    *ended, (last, left) = jobs.in_processes("crashing:perform", [1, 2, 3, 4, 5], run, 60)
    rows = [row for row, _ in ended]
    assert last is None
    assert [row["job"] for row in rows] == [1, 2, 3, 4, 5] and not left
    assert [row["job"] for row in rows if not row["ok"]] == [2, 4]
    assert "exit 7" in rows[1]["error"]
    assert rows[2]["process"] == rows[3]["process"] != rows[4]["process"]
