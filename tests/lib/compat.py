"""The fast tests under each torch that is promised, each in an environment that is then removed.

All load one library, which is compiled before, for the torch of this Python.

    python tests/lib/compat.py 2.11.0:3.10 2.15.0:3.13 [-- -k name]
    python tests/lib/compat.py 2.13.0:3.11:5.0.0

A case is a torch and a Python; with a transformers as the third, the integrations are tested in
place of the rest. The Python is found on PATH or among those of pyenv. What comes after -- goes to
pytest. An environment takes 6 GB; KEEP=1 leaves it in build/compat/ for the next run. Exit code 1
where something fails.
"""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

from building import folders
from elsewhere import ROOT, Result, copy_sources, failure, run_tests, show

# One copy of the sources for all: the units free of torch are compiled once.
FOLDER = ROOT / "build" / "compat"
FAST = ["-m", "fast and not integrations"]


def python_of(version: str) -> str:
    """The interpreter of this version, as in "3.12"."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for path in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")):
        # pyenv puts names on PATH whose version is not the chosen one; such a name fails.
        if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
            return str(path)
    raise FileNotFoundError(f"Python {version} is neither on PATH nor among those of pyenv")


def make_environment(folder: Path, torch: str, python: str, *wanted: str) -> Path:
    """An environment with this torch and what else pip is to install; returns its Python."""
    # Constraints of this machine are meant for its own packages.
    env = os.environ | {"PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env |= {"CLINATTN_SKIP_EXT": "1"}
    run = lambda *command: subprocess.run(command, env=env, cwd=folder.parent, check=True)
    inside = folder / "bin" / "python"
    done = folder / "complete"
    pip = (inside, "-m", "pip", "install", "--quiet", "--no-cache-dir")
    if done.exists():  # pip takes a wheel of the same version for installed
        run(inside, "-m", "pip", "uninstall", "--quiet", "--yes", "clinattn")
    else:
        run(python_of(python), "-m", "venv", "--clear", folder)
        run(*pip, "--upgrade", "pip", "setuptools>=77", "ninja")
        run(*pip, f"torch=={torch}")
        done.touch()
    run(*pip, "--no-build-isolation", f"torch=={torch}", *wanted)
    return inside


def build_library() -> Path:
    """The library, which every torch is to load."""
    copy_sources(FOLDER)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, env=os.environ | {"CLINATTN_CUDA": "0"}, cwd=FOLDER, check=True)
    return Path(shutil.copy(FOLDER / "clinattn" / folders.LIBRARY, FOLDER))


def try_case(case: str, library: Path, options: list[str]) -> Result:
    torch, python, transformers = (case.split(":") + [""])[:3]
    folder = FOLDER / f"torch-{torch}-python-{python}"
    copy_sources(FOLDER)
    shutil.copy(library, FOLDER / "clinattn")
    try:
        extras = ["integrations"] if transformers else ["bench", "test"]
        pinned = [f"transformers=={transformers}"] if transformers else []
        wanted = [*pinned, "-e", f"{FOLDER}[{','.join(extras)}]"]
        inside = make_environment(folder, torch, python, *wanted)
        suite = ["integrations/packages"] if transformers else []
        return run_tests(inside, [*(suite or FAST), *options], FOLDER)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        return failure("environment", error)
    finally:
        if os.environ.get("KEEP") != "1":
            shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    cases, options = arguments[:cut], arguments[cut + 1 :]
    if not cases or any(len(case.split(":")) not in (2, 3) for case in cases):
        print(__doc__)
        return 2
    today = datetime.date.today().isoformat()
    library, rows = build_library(), []
    for case in cases:
        torch, python, transformers = (case.split(":") + [""])[:3]
        rows.append(((torch, python, transformers, today), try_case(case, library, options)))
    return show(("torch", "Python", "transformers", "date"), rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
