"""The Triton tests under several versions of Triton, each in an environment that is then removed.

    python tests/lib/triton_matrix.py 3.6.0 3.9.0

An environment holds its Triton, and an older numpy where that needs one, and sees the other
packages of this one. CLINATTN_TESTS=every compiles every variant here too.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from elsewhere import Result, failure, run_tests, show

# The files, and the settings that each needs.
SUITES = {
    "ahead of time": ("triton/test_triton_aot.py", {}),
    "interpreter": ("triton/interpreted", {"TRITON_INTERPRET": "1"}),
}
# Interpreters before 3.7 pass arrays of one element for numbers, which numpy 2.4 refuses.
OLD_NUMPY = "numpy<2.4"


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


def try_version(version: str) -> dict[str, Result]:
    with tempfile.TemporaryDirectory(prefix=f"triton-{version}-") as name:
        folder = Path(name)
        try:
            python = make_environment(folder, version)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            return {"environment": failure("environment", error)}
        cache = {"TRITON_CACHE_DIR": str(folder / "cache")}
        return {
            suite: run_tests(python, [file], folder, **cache, **settings)
            for suite, (file, settings) in SUITES.items()
        }


def main(versions: list[str]) -> int:
    if not versions:
        print(__doc__)
        return 2
    results = {version: try_version(version) for version in versions}
    rows = [
        ((version, suite), result)
        for version, suites in results.items()
        for suite, result in suites.items()
    ]
    return show(("Triton", "tests"), rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
