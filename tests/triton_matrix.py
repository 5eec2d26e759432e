"""The Triton tests under several versions of Triton, each in an environment that is then removed.

    python tests/triton_matrix.py 3.6.0 3.9.0

An environment holds its Triton, and an older numpy where that needs one, and sees the other
packages of this one. CLINATTN_TEST_ALL=1 compiles every variant here too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
# The files, and the settings that each needs.
SUITES = {
    "ahead of time": ("test_triton_aot.py", {}),
    "interpreter": ("interpreted_triton.py", {"TRITON_INTERPRET": "1"}),
}
RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
# Interpreters before 3.7 pass arrays of one element for numbers, which numpy 2.4 refuses.
OLD_NUMPY = "numpy<2.4"


class Result(NamedTuple):
    """Tests of a suite by outcome, and the failed ones: (test, first line of the reason)."""

    passed: int
    skipped: int
    failed: list[tuple[str, str]]
    seconds: float


def make_environment(folder: Path, version: str) -> Path:
    """An environment with this Triton before the packages of this one; returns its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    old = tuple(map(int, version.split(".")[:2])) < (3, 7)
    packages = [f"triton=={version}", *([OLD_NUMPY] if old else [])]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *packages], check=True)
    # addsitedir appends, and follows the path files there: clinattn may be installed by one.
    others = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (own_packages,) = folder.glob("lib/python*/site-packages")
    (own_packages / "others.pth").write_text(others)
    found = subprocess.check_output(
        [python, "-c", "import triton, numpy; print(triton.__version__, numpy.__version__)"],
        text=True,
    )
    if found.split()[0] != version:
        raise RuntimeError(f"asked for Triton {version}, got {found}")
    print(f"Triton {version}, numpy {found.split()[1]}", flush=True)
    return python


def run_suite(python: Path, folder: Path, name: str) -> Result:
    file, settings = SUITES[name]
    report = folder / "report.xml"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    began = time.monotonic()
    # In tests/, and not at the root: its folder kernels/ would shadow another package.
    done = subprocess.run(
        [python, "-c", RUN, file, *options],
        cwd=TESTS,
        env=keep | {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"} | settings,
    )
    took = time.monotonic() - began
    if not report.exists():
        return Result(0, 0, [(file, f"pytest ended with {done.returncode}")], took)
    result = read_report(report, took)
    report.unlink()
    if done.returncode and not result.failed:
        result.failed.append((file, f"pytest ended with {done.returncode}"))
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


def try_version(version: str) -> dict[str, Result]:
    with tempfile.TemporaryDirectory(prefix=f"triton-{version}-") as folder:
        try:
            python = make_environment(Path(folder), version)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            return {"environment": Result(0, 0, [("environment", str(error))], 0.0)}
        return {name: run_suite(python, Path(folder), name) for name in SUITES}


def main(versions: list[str]) -> int:
    if not versions:
        print(__doc__)
        return 2
    results = {version: try_version(version) for version in versions}
    rows = [(version, *row) for version, suites in results.items() for row in suites.items()]
    for version, name, result in rows:
        for test, reason in result.failed:
            print(f"{version} {name}: {test}\n    {reason}")
    print(f"\n{'Triton':8} {'tests':14} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for version, name, result in rows:
        counts = f"{result.passed:7} {len(result.failed):7} {result.skipped:8}"
        print(f"{version:8} {name:14} {counts} {result.seconds:8.0f}")
    return int(any(result.failed for *_, result in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
