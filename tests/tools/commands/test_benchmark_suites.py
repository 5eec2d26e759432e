"""bench/suites under pytest-benchmark: each case checks and runs, and what a row holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import BENCH, ROOT

import clinattn

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
if not clinattn.backends()["cpu"]:
    pytest.skip("the compiled backend is not built here", allow_module_level=True)

QUICK = (
    "(chunks_4x128 and fp32 and not flex) or (tiny_population and infer) "
    "or (memory and clinattn) or grows or startup or linear"
)


@pytest.fixture
def suite(tmp_path):
    """pytest bench/suites with one thread, in a process of its own."""

    def run(words: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", str(BENCH / "suites"), "-q", "-k", words]
        command += ["-p", "no:cacheprovider", "--rootdir", str(ROOT), *options]
        # pytest-benchmark takes a child of a process of pytest-xdist for another such process
        given = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        variables = given | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )

    return run


def test_every_suite_checks_its_cases(suite):
    done = suite(QUICK, "--benchmark-disable")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


@pytest.fixture
def measured(suite, tmp_path):
    path = tmp_path / "rows.json"
    words = "chunks_4x128 and fp32 and forward and not backward and (eager or clinattn-cpu)"
    done = suite(words, "--benchmark-only", "--benchmark-json", str(path), "--benchmark-autosave")
    assert done.returncode == 0, done.stdout[-3000:]
    return words, json.loads(path.read_text())


def test_a_row_says_what_it_depends_on_and_a_later_run_compares(suite, measured):
    words, content = measured
    assert content["machine_info"]["clinattn"]["torch"]
    rows = {row["extra_info"]["way"]: row for row in content["benchmarks"]}
    assert rows.keys() == {"clinattn-cpu", "eager"}
    for row in rows.values():
        extra = row["extra_info"]
        assert row["group"] == "chunks_4x128 fp32 forward"
        assert row["options"]["timer"].endswith("timer")
        assert {"cpu", "threads", "commit", "torch", "dtype", "longest"} <= extra.keys()
        rate, seconds = extra["tokens_per_s"], row["stats"]["median"]
        assert rate["median"] == pytest.approx(extra["tokens"] / seconds, rel=1e-6)
        assert extra["ratio_to_peer"] > 0 and 0 < extra["of_peak"]
        flops = 4 * 4 * 128**2 * 4 * 64
        assert extra["gflop_per_s"] == pytest.approx(flops / seconds / 1e9, abs=0.06)
    done = suite(words, "--benchmark-only", "--benchmark-compare")
    assert done.returncode == 0 and "Comparing against benchmarks" in done.stderr


def test_a_wrong_way_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import torch

    from suites.peers import WAYS
    from suites.problem import AttentionCase, check

    class Wrong(WAYS["eager"]):  # type: ignore[misc]
        def forward(self):
            return super().forward() * 1.01

    case = AttentionCase((33, 7), 2, 16)
    check(case, torch.float32, torch.device("cpu"), [WAYS["eager"]], naive=WAYS["eager"])
    with pytest.raises(AssertionError):
        check(case, torch.float32, torch.device("cpu"), [Wrong], naive=WAYS["eager"])
