"""One compiled library serves every Python and every torch from 2.11 on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from building import folders
from places import LIB, ROOT
from support import BACKENDS

# The Pythons that `KEEP=1 make compat` leaves, and those that CLINATTN_TESTS_PYTHONS names.
NAMED = filter(None, os.environ.get("CLINATTN_TESTS_PYTHONS", "").split(os.pathsep))
PYTHONS = [sys.executable, *map(str, ROOT.glob("build/compat/*/bin/python")), *NAMED]

pytestmark = pytest.mark.skipif(
    "cpu" not in BACKENDS, reason="the compiled backend is not built here"
)


@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: Path(path).parents[1].name)
def test_the_same_file_is_loaded_and_computes(python, tmp_path):
    env = {x: y for x, y in os.environ.items() if not x.startswith(("CLINATTN_", "PYTHON"))}
    done = subprocess.run(
        [python, str(LIB / "one_library.py")],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # pytest -s shows the versions
    assert "36 of 36 calls agree" in done.stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_uses_the_stable_interface_alone():
    library = ROOT / "clinattn" / folders.LIBRARY
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=1)[1] for line in said.splitlines()]
    assert any(name.startswith("torch_call_dispatcher") for name in names)
    unstable = [x for x in names if x.startswith(("Py", "_Py", "at::", "c10::", "torch::"))]
    assert not unstable, unstable
