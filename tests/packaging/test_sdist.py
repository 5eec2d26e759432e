"""The archive of the sources holds the repository, wherever and under whatever it is made."""

import shutil
import sys
import tarfile

import pytest
from installs import copy_repository, repository_files, run
from places import ROOT

MADE = {"PKG-INFO", "setup.cfg"}
# Where there is no torch, and where the kernels are left out
WAYS = {
    "as it is": ("", {}),
    "without torch": ("import sys; sys.modules['torch'] = None; ", {}),
    "without kernels": ("", {"CLINATTN_SKIP_EXT": "1"}),
}
LEFT_BEHIND = (
    "clinattn/libclinattn.so", "bench/out/results.json", "tests/__pycache__/a.cpython-311.pyc",
    "build/x.o", "tests/.pytest_cache/a", ".venv/a",
)  # fmt: skip


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The archive made in each way, from a copy with files that runs leave behind."""
    folder = tmp_path_factory.mktemp("sources")
    copy_repository(folder)
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = {}
    for way, (before, settings) in WAYS.items():
        code = f"{before}from setuptools.build_meta import build_sdist; build_sdist('dist')"
        run(sys.executable, "-c", code, cwd=folder, **settings)
        (path,) = (folder / "dist").glob("*.tar.gz")
        found[way] = shutil.move(path, tmp_path_factory.mktemp("archive"))
    return found


def names_in(archive):
    with tarfile.open(archive) as opened:
        names = {x.name.partition("/")[2] for x in opened.getmembers() if x.isfile()}
    return {x for x in names if not x.startswith("clinattn.egg-info/")} - MADE


def test_the_archive_is_the_same_in_every_way(archives):
    lists = {way: names_in(path) for way, path in archives.items()}
    assert all(names == lists["as it is"] for names in lists.values())
    assert not lists["as it is"] & set(LEFT_BEHIND)


def test_the_archive_holds_the_repository(archives):
    kept = repository_files()
    if kept is None:
        pytest.skip("this is no checkout of git")
    assert names_in(archives["without torch"]) == set(kept)


def test_an_archive_of_an_unpacked_archive_is_the_same(archives, tmp_path):
    with tarfile.open(archives["as it is"]) as opened:
        opened.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=folder)
    (again,) = (folder / "dist").glob("*.tar.gz")
    assert names_in(again) == names_in(archives["as it is"])


def test_make_starts_in_an_unpacked_archive(archives, tmp_path):
    """Without kernels, since to compile them takes a minute; `make wheel` compiles them."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    with tarfile.open(archives["as it is"]) as opened:
        opened.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    tests = "tests/operator/test_ranges.py"
    assert (ROOT / tests).exists()
    make = ["make", "test", "OFFLINE=1", f"PYTHON={sys.executable}", f"PYTEST_ARGS={tests}"]
    done = run(*make, cwd=folder, CLINATTN_SKIP_EXT="1", PYTHONPATH="", PYTHONSAFEPATH="")
    assert "all passed" in done.stdout
    assert not (folder / "clinattn" / "libclinattn.so").exists()
