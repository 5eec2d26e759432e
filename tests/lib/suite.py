"""`make test` and `make test-all`: pytest in a few sessions, for tests that need their own.

    python tests/lib/suite.py [--all] [--keep-seconds] [arguments of pytest]

Triton decides how a kernel runs when it is decorated, so interpreted kernels need a process whose
environment says so; emulated instruction sets take the place of the compiled module; tests that
judge by time run alone. Without --all: the fast tests, and a sample of the others (tiers.py).
Paths of tests among the arguments choose the sessions that hold them, and every test there runs.
Exit code 1 where a test fails, 130 after Ctrl-C, which still prints the table of seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from building import extension
from kept import inductor_cache
from places import LIB, ROOT, TESTS
from seconds import keep, table

RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
NOTHING_RUN, INTERRUPTED = 5, 2  # pytest's status where no test is selected, and after Ctrl-C
MOST_PROCESSES = 8


@dataclass(frozen=True)
class Session:
    """Tests that share a process: where they lie, and what pytest and its environment get.

    without: a folder in `paths` that has a session of its own.
    """

    name: str
    paths: tuple[str, ...]
    options: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    parallel: bool = True
    without: str = ""


INTERPRETED = "tests/triton/interpreted"
MAIN = Session("kernels of this machine", ("tests",), ("-m", "not timed"), without=INTERPRETED)
WITHOUT_PACKAGES = replace(MAIN, options=("-m", "not timed and not integrations"))
INTERPRETER = Session("Triton's interpreter", (INTERPRETED,), settings={"TRITON_INTERPRET": "1"})
EMULATED_SETS = Session(
    "emulated AVX-512, AVX512-BF16 and AMX",
    tuple(
        f"tests/{name}.py"
        for name in (
            "cpu/test_sizes", "cpu/test_float32_precision", "cpu/test_linear",
            "cpu/test_linear_layers", "cpu/test_linear_ranges", "cpu/test_unseen_keys",
            "cpu/test_instruction_sets", "cpu/test_summary_sets", "operator/test_extremes",
        )
    ),
    ("-m", "not timed", "-p", "emulated_sets", "-k", "not scalar and not avx2"),
)  # fmt: skip
TIMED = Session("judged by time", ("tests",), ("-m", "timed"), parallel=False, without=INTERPRETED)


def instruction_sets() -> tuple[str, ...]:
    command = [sys.executable, "-c", "import clinattn._C as c; print(*c.instruction_sets())"]
    return tuple(subprocess.run(command, capture_output=True, text=True).stdout.split())


def sessions(everything: bool) -> list[Session]:
    found = [MAIN if everything else WITHOUT_PACKAGES, INTERPRETER]
    if everything:
        found.append(TIMED)
        if "amx" in instruction_sets():
            print("This machine has AMX: nothing is emulated in its place.")
        elif reason := extension.missing():
            print(f"AVX-512, AVX512-BF16 and AMX are not emulated: {reason}")
        else:
            found.insert(2, EMULATED_SETS)
    return found


def is_path(argument: str) -> bool:
    """Returns whether an argument is a file or folder of tests, not e.g. the word after -k."""
    path = file_of(argument)
    return path.is_relative_to(TESTS) and path.exists()


def file_of(argument: str) -> Path:
    return (ROOT / argument.split("::")[0]).resolve()


def chosen(session: Session, arguments: list[str]) -> list[str] | None:
    """Arguments of pytest for a session; None where the paths given all lie elsewhere."""
    given = [x for x in arguments if is_path(x)]
    rest = [x for x in arguments if not is_path(x)]
    if not given:
        return [*session.paths, *rest]
    folders = [ROOT / path for path in session.paths]
    mine = [x for x in given if any(file_of(x).is_relative_to(f) for f in folders)]
    if session.without:
        mine = [x for x in mine if not file_of(x).is_relative_to(ROOT / session.without)]
    return [*mine, *rest] if mine else None


def run(session: Session, arguments: list[str], settings: dict[str, str]) -> tuple[int, Counter]:
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "seconds.json"
        processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
        parallel = ["-n", str(processes), "--dist", "worksteal"] if session.parallel else []
        env = os.environ | settings | session.settings
        env |= {"CLINATTN_SECONDS": str(written), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(inductor_cache()))
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile every module
        env["PYTHONPATH"] = os.pathsep.join([str(LIB), *filter(None, [env.get("PYTHONPATH")])])
        command = [sys.executable, "-c", RUN, "-q", *parallel, *session.options, *arguments]
        status = subprocess.run(command, cwd=ROOT, env=env).returncode
        seconds = json.loads(written.read_text()) if written.exists() else {}
    return status, Counter(seconds)


def main(arguments: list[str]) -> int:
    given = [x for x in arguments if x not in ("--all", "--keep-seconds")]
    everything = "--all" in arguments or any(map(is_path, given))
    mode = os.environ.get("CLINATTN_TESTS", "all") if everything else "sample"
    settings = {"CLINATTN_TESTS": mode}
    failed, ran, seconds, began = [], 0, Counter(), time.monotonic()
    interrupted = False
    for session in sessions(everything):
        options = chosen(session, given)
        if options is None or interrupted:
            continue
        print(f"\n{session.name}", flush=True)
        try:
            if session is EMULATED_SETS:
                subprocess.run([sys.executable, str(LIB / "emulated_sets.py")], check=True)
            status, took = run(session, options, settings)
        except KeyboardInterrupt:  # pytest has had it, too, and told what had failed by then
            status, took, interrupted = INTERRUPTED, Counter(), True
        interrupted |= status == INTERRUPTED
        seconds.update(took)
        ran += status != NOTHING_RUN
        if status not in (0, NOTHING_RUN, INTERRUPTED):
            failed.append(session.name)
    print(f"\n{table(seconds)}\n")
    if "--keep-seconds" in arguments and not failed:
        keep(seconds)
    minutes = (time.monotonic() - began) / 60
    verdict = f"failed: {', '.join(failed)}" if failed else "all passed"
    print(f"{minutes:.1f} minutes; {'interrupted; ' * interrupted}{verdict}")
    return 130 if interrupted else int(bool(failed) or not ran)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
