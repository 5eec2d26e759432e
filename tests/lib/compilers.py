"""The extension built by several compilers, without a warning, and the tests of its kernels.

    python tests/lib/compilers.py [g++-13 clang++-16 ...]

Without names: every g++ and clang++ on PATH. Each builds a copy of the sources in a folder of its
own, build/compilers/NAME, which stays, so that a second run compiles what has changed. Exit code 1
where something fails.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from elsewhere import ROOT, Result, copy_sources, failure, run_tests, show

KEPT = ROOT / "build" / "compilers"
STATUS = "import clinattn; print(clinattn.backends()['cpu'], clinattn.__file__)"
# Tests of what the compiled kernels alone decide, on every instruction set that this machine runs.
SELECTION = ["packaging/test_includes.py", "operator/test_rotary.py"]
SELECTION += ["cpu/exhaustive/test_exponential.py", "cpu/test_instruction_sets.py"]
SELECTION += ["cpu/test_denormals.py", "cpu/test_linear.py"]


def on_the_path() -> list[str]:
    """The g++ and clang++ on PATH, with or without a version in the name, each once."""
    found: dict[Path, str] = {}
    for folder in map(Path, os.get_exec_path()):
        for path in sorted(folder.glob("*++*")):
            if re.fullmatch(r"(g|clang)\+\+(-\d+)?", path.name) and os.access(path, os.X_OK):
                found.setdefault(path.resolve(), path.name)
    return sorted(found.values())


def build(compiler: str, folder: Path) -> str | None:
    """Compiles the copy; returns what is wrong, after the compiler's own words are printed."""
    log = folder / "build.log"
    env = os.environ | {"CXX": compiler}
    with log.open("w") as file:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT)
    said = log.read_text()
    if done.returncode:
        print(said)
        return f"the build ended with {done.returncode}"
    # Warnings inside torch's headers are torch's.
    warned = [x for x in said.splitlines() if "warning:" in x and "/torch/include/" not in x]
    if warned:
        return "; ".join([f"{len(warned)} warnings", *warned[:3]])
    status = subprocess.check_output(
        [sys.executable, "-c", STATUS], cwd=folder, env=env | {"PYTHONPATH": str(folder)}, text=True
    )
    loaded = status.strip() == f"usable {folder / 'clinattn' / '__init__.py'}"
    return None if loaded else f"the module does not serve: {status.strip()}"


def try_compiler(compiler: str) -> Result:
    if shutil.which(shlex.split(compiler)[0]) is None:
        return failure("compiler", "it is not on PATH")
    folder = KEPT / re.sub(r"[^\w+.-]", "_", compiler)
    folder.mkdir(parents=True, exist_ok=True)
    copy_sources(folder)
    print(f"{compiler}: building in {folder.relative_to(ROOT)}", flush=True)
    began = time.monotonic()
    if wrong := build(compiler, folder):
        return failure("build", wrong)
    print(f"{compiler}: built in {time.monotonic() - began:.0f} s", flush=True)
    settings = {"PYTHONPATH": str(folder), "CXX": compiler, "CLINATTN_BACKEND": "cpu"}
    return run_tests(sys.executable, SELECTION, folder, **settings, CLINATTN_TESTS="all")


def version(compiler: str) -> str:
    command = [*shlex.split(compiler), "--version"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return "?"
    return (said.splitlines() or ["?"])[0]


def main(names: list[str]) -> int:
    names = names or on_the_path()
    if not names:
        print("no g++ or clang++ is on PATH", file=sys.stderr)
        return 1
    rows = [((name, version(name)), try_compiler(name)) for name in names]
    return show(("compiler", "version"), rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
