"""bench/cpu/compare.py: the other revision comes and goes, and both sides are timed in turns."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import BENCH

import clinattn

pytest.importorskip("rich")
if shutil.which("git") is None:
    pytest.skip("git is not installed", allow_module_level=True)

IDENTITY = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull}
IDENTITY |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


@pytest.fixture(scope="module")
def base_tree(bench_on_the_path):
    return importlib.import_module("base_tree")


@pytest.fixture(scope="module")
def compare(bench_on_the_path):
    return importlib.import_module("cpu.compare")


@pytest.fixture
def git(tmp_path):
    """git in a folder of one commit, whose setup.py does what the test wrote into it."""
    folder = tmp_path / "project"

    def run(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.check_output(command, env={**os.environ, **IDENTITY}, text=True).strip()

    (folder / "clinattn").mkdir(parents=True)
    (folder / "bench" / "cpu").mkdir(parents=True)
    (folder / "csrc").mkdir()
    for name in ("cpu/compare.py", "base_tree.py", "rows_file.py"):
        shutil.copy(BENCH / name, folder / "bench" / name)
    (folder / ".gitignore").write_text("*.so\n__pycache__/\n")
    for name in ("csrc/facts.cpp", "clinattn/__init__.py"):
        (folder / name).touch()
    touch = "import pathlib; pathlib.Path('clinattn/libclinattn.so').touch()\n"
    (folder / "setup.py").write_text(touch)
    run("init", "-q", "-b", "main")
    run("add", "-A")
    run("commit", "-qm", "first")
    (folder / "clinattn" / "libclinattn.so").touch()
    run.folder = folder
    return run


def worktrees(git) -> int:
    return len(git("worktree", "list").splitlines())


@pytest.mark.parametrize("revision", ["main", "HEAD", "HEAD^{commit}"])
def test_a_revision_is_a_commit(base_tree, git, revision):
    assert base_tree.commit_of(git.folder, revision) == git("rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("v9", "BASE='v9' is no revision of project: expected a branch, a tag or a commit"),
        ("", "BASE='': expected a revision"),
        ("--all", "BASE='--all': expected a revision"),
        ("HEAD:setup.py", "is no revision of project"),
    ],
)
def test_no_revision_is_named(base_tree, git, revision, message):
    with pytest.raises(base_tree.Refused, match=message):
        base_tree.commit_of(git.folder, revision)


def test_no_repository_is_named(base_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(base_tree.Refused, match="not a git repository"):
        base_tree.commit_of(tmp_path, "HEAD")


def test_what_is_not_committed_is_counted(base_tree, git):
    commit = git("rev-parse", "--short=12", "HEAD")
    assert base_tree.description(git.folder) == commit
    (git.folder / "new.py").touch()
    (git.folder / "setup.py").write_text("")
    assert base_tree.description(git.folder) == f"{commit} with 1 changed file"


def test_a_build_older_than_its_sources_is_refused(base_tree, git):
    of_an_older_version = git.folder / "clinattn" / "_C.cpython-30-x86_64-linux-gnu.so"
    of_an_older_version.touch()
    os.utime(of_an_older_version, (0, 0))
    base_tree.require_fresh_build(git.folder)
    later = time.time() + 10
    os.utime(git.folder / "csrc" / "facts.cpp", (later, later))
    with pytest.raises(base_tree.Refused, match="csrc/facts.cpp was changed after"):
        base_tree.require_fresh_build(git.folder)
    (git.folder / "clinattn" / "libclinattn.so").unlink()
    with pytest.raises(base_tree.Refused, match="no compiled clinattn/libclinattn.so"):
        base_tree.require_fresh_build(git.folder)


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ValueError])
def test_the_worktree_is_removed_however_it_ends(base_tree, git, end):
    (git.folder / "setup.py").write_text("")  # of this tree alone: it is not committed
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with base_tree.checked_out(git.folder, git("rev-parse", "HEAD")) as tree:
            assert worktrees(git) == 2
            base_tree.build(tree, "0" * 40)
            assert (tree / "clinattn" / "libclinattn.so").is_file()
            if end is not None:
                raise end
    except (KeyboardInterrupt, ValueError) as error:
        assert type(error) is end
    assert not tree.exists() and not tree.parent.exists()
    assert worktrees(git) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_build_that_fails_says_how(base_tree, git):
    (git.folder / "clinattn" / "libclinattn.so").unlink()
    (git.folder / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(base_tree.Refused, match="0000 does not build here:\nno compiler"):
        base_tree.build(git.folder, "0" * 12)
    (git.folder / "setup.py").unlink()
    with pytest.raises(base_tree.Refused, match="has no setup.py"):
        base_tree.build(git.folder, "0" * 12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_during_the_build_leaves_nothing(git, tmp_path, number):
    started = tmp_path / "started"
    # as setup.py has compilers
    slow = f"import pathlib, subprocess; pathlib.Path({str(started)!r}).touch()\n"
    slow += f"subprocess.run(['sh', '-c', 'sleep 3; touch {tmp_path}/survived'])\n"
    (git.folder / "setup.py").write_text(slow)
    git("commit", "-qam", "slow")
    (git.folder / "clinattn" / "libclinattn.so").touch()
    command = [sys.executable, str(git.folder / "bench" / "cpu" / "compare.py"), "HEAD"]
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    # Signals are not ignored in the child, whatever this process was started with.
    with subprocess.Popen(
        command,
        env=variables,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        deadline = time.monotonic() + 30
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started.exists() and worktrees(git) == 2
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert worktrees(git) == 1
    assert not list(tmp_path.glob("clinattn-base-*"))
    time.sleep(3)
    assert not (tmp_path / "survived").exists()


def test_an_unknown_revision_ends_with_a_line(git):
    command = [sys.executable, str(git.folder / "bench" / "cpu" / "compare.py"), "v9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: BASE='v9' is no revision of project: expected")


def test_sides_take_turns_and_the_first_round_is_dropped(compare):
    order = []

    class Side:
        def __init__(self, name):
            self.name = name

        def ask(self, what, way):
            order.append(self.name)
            return {"seconds": float(len(order)), "process": 0.5}

    base_s, here_s, spent = compare.in_turns(Side("base"), Side("here"), "", 3)
    assert order == ["here", "base", "base", "here"] * 2
    assert (base_s, here_s) == ([3, 6, 7], [4, 5, 8])
    assert len(spent) == 6 and all(one.process > 0.5 for one in spent)


def test_a_ratio_above_one_is_this_tree_faster(compare):
    row = compare.Row("a", "fp32", "forward", base_s=[2, 4, 6], here_s=[1, 2, 4])
    assert row.ratio == 2 and row.quartiles == (1.75, 2)
    slower = compare.Row("a", "fp32", "forward", base_s=[1, 1, 1], here_s=[2, 2, 2])
    assert "geometric mean of 2 ratios: 1.000" in compare.summary([row, slower])
    assert compare.table([row, slower], "v1").row_count == 2


@pytest.mark.skipif(not clinattn.backends()["cpu"], reason="the compiled backend is not built here")
class TestWholeRun:
    @pytest.fixture
    def same_tree(self, compare, monkeypatch):
        """Base is this tree: nothing is checked out or built."""

        @contextmanager
        def checked_out(root, commit):
            yield Path(clinattn.__file__).resolve().parent.parent

        monkeypatch.setattr(compare, "commit_of", lambda root, revision: "0" * 40)
        monkeypatch.setattr(compare, "description", lambda root: "0" * 12)
        monkeypatch.setattr(compare, "require_fresh_build", lambda root: None)
        monkeypatch.setattr(compare, "checked_out", checked_out)
        monkeypatch.setattr(compare, "build", lambda tree, commit: None)
        return checked_out

    @pytest.fixture
    def run(self, compare, same_tree, tmp_path, capfd):
        def run(words):
            given = argparse.Namespace(
                base="HEAD", k=words, rounds=2, threads=1, json=tmp_path / "rows.json"
            )
            code = compare.run(given, compare.Console(stderr=True))
            return code, capfd.readouterr(), tmp_path / "rows.json"

        return run

    def test_both_columns_and_the_ratio(self, run):
        code, written, path = run("full N1024 D64 fp32 forward")
        assert code == 0, written
        content = json.loads(path.read_text())
        (row,) = content["rows"]
        assert (row["case"], row["dtype"], row["passes"]) == ("full N1024 D64", "fp32", "forward")
        assert len(row["base_s"]) == len(row["here_s"]) == 2 and row["ratio"] > 0
        assert content["base"]["threads"] == content["here"]["threads"] == 1
        for words in ("HEAD", "this tree", "ratio", f"{row['ratio']:.2f}", "geometric mean of 1"):
            assert words in written.out

    def test_words_without_a_case_are_refused(self, compare, run):
        with pytest.raises(compare.Refused, match="-k 'no such case' fits no case"):
            run("no such case")

    def test_another_clinattn_is_not_taken_for_the_base(
        self, compare, same_tree, run, monkeypatch, tmp_path
    ):
        @contextmanager
        def elsewhere(root, commit):
            yield tmp_path

        monkeypatch.setattr(compare, "checked_out", elsewhere)
        monkeypatch.setenv("PYTHONSAFEPATH", "")
        with pytest.raises(compare.Refused, match="HEAD"):
            run("full N1024 D64 fp32 forward")


def test_quick_words_fit_cases(compare):
    side = importlib.import_module("cpu.side").Side()
    assert all(side.list(words) for words in compare.QUICK)
