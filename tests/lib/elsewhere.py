"""Tests in another environment than this one, and the table of what came of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from places import ROOT, TESTS

RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"

OF_THIS_ENVIRONMENT = ("PYTHONPATH", "PYTEST_ADDOPTS", "TRITON_INTERPRET")


class Result(NamedTuple):
    """Tests by outcome, and the failed ones: (test, first line of the reason)."""

    passed: int
    skipped: int
    failed: list[tuple[str, str]]
    seconds: float


def failure(what: str, reason: object) -> Result:
    """The result of something other than a test that went wrong."""
    return Result(0, 0, [(what, str(reason))], 0.0)


def copy_sources(folder: Path) -> None:
    """The sources with the times of their last change, by which ninja knows what to compile."""
    for name in ("clinattn", "csrc", "kernels", "build_support"):
        shutil.rmtree(folder / name, ignore_errors=True)
        leave = shutil.ignore_patterns("__pycache__", "*.so", "kernels")
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    (folder / "clinattn" / "kernels").symlink_to("../kernels")  # where it is installed
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)


def run_tests(
    python: Path | str, arguments: Iterable[str], folder: Path, **settings: str
) -> Result:
    """Run pytest under another Python; `folder` takes the report for a moment.

    settings: environment variables. The tests see one thread, and no variable
    of OF_THIS_ENVIRONMENT.
    """
    report = folder / "report.xml"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    keep = {k: v for k, v in os.environ.items() if k not in OF_THIS_ENVIRONMENT}
    began = time.monotonic()
    # In tests/, and not at the root: its folder kernels/ would shadow another package.
    done = subprocess.run(
        [python, "-c", RUN, *arguments, *options],
        cwd=TESTS,
        env=keep | {"OMP_NUM_THREADS": "1"} | settings,
    )
    took = time.monotonic() - began
    if not report.exists():
        return Result(0, 0, [("pytest", f"it ended with {done.returncode}")], took)
    result = read_report(report, took)
    report.unlink()
    if done.returncode and not result.failed:
        result.failed.append(("pytest", f"it ended with {done.returncode}"))
    return result


def read_report(path: Path, took: float) -> Result:
    passed, skipped, failed = 0, 0, []
    for test in ElementTree.parse(path).iter("testcase"):
        wrong = [*test.iter("failure"), *test.iter("error")]
        if wrong:
            reason = (wrong[0].get("message") or wrong[0].text or "").strip()
            failed.append((test.get("name", ""), (reason.splitlines() or [""])[0][:200]))
        elif test.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Result(passed, skipped, failed, took)


def show(heads: tuple[str, ...], rows: list[tuple[tuple[str, ...], Result]]) -> int:
    """Print failures, then a table; the exit status: 1 where something failed."""
    for names, result in rows:
        for test, reason in result.failed:
            print(f"{' '.join(names)}: {test}\n    {reason}")
    widths = [max(map(len, column)) for column in zip(heads, *[x for x, _ in rows], strict=True)]
    pad = lambda words: "  ".join(x.ljust(w) for x, w in zip(words, widths, strict=True))
    print(f"\n{pad(heads)} {'passed':>8} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for names, result in rows:
        counts = f"{result.passed:8} {len(result.failed):7} {result.skipped:8}"
        print(f"{pad(names)} {counts} {result.seconds:8.0f}")
    return int(any(result.failed for _, result in rows))
