"""The log of a build, ccache before the compiler, and what is kept or locked between processes."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from building import ninja, toolchain
from kept import digest, kept, one_at_a_time
from places import LIB

compiles = pytest.mark.skipif(
    shutil.which(toolchain.compiler()[0]) is None or ninja.program() is None,
    reason="a C++ compiler and ninja are needed",
)
WARNS = "int unused() { int never_read; return 0; }\n"


@pytest.fixture
def build(tmp_path, capfd):
    """Builds a library of two files, one with a warning; returns what was shown."""
    for name, text in {"plain": "int plain() { return 1; }\n", "isa_warns": WARNS}.items():
        (tmp_path / f"{name}.cpp").write_text(text)
    units = {path.stem: ninja.Unit(path, ["-fPIC", "-Wall"]) for path in tmp_path.glob("*.cpp")}
    library = ninja.Library("both.so", [], [])

    def run():
        ninja.build("for a test", toolchain.compiler(), units, tmp_path / "built", library)
        assert (tmp_path / "built" / "both.so").exists()
        return capfd.readouterr().err

    return run


@compiles
def test_a_build_shows_names_seconds_and_warnings(build, monkeypatch):
    monkeypatch.setenv("V", "")
    shown = build()
    assert shown.startswith("compiling 2 files for a test:")
    assert shown.endswith(" s\n")
    assert {"plain", "warns", "link"} <= set(shown.replace(",", " ").split())
    assert "never_read" in shown
    assert "-c" not in shown.split() and ninja.STEP not in shown
    assert build() == ""


@compiles
def test_v_shows_the_commands(build, monkeypatch):
    monkeypatch.setenv("V", "1")
    assert " -fPIC -Wall -c " in build()


@compiles
def test_an_error_is_shown_and_raised(build, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("V", "")
    (tmp_path / "plain.cpp").write_text("int plain( { return 1; }\n")
    with pytest.raises(subprocess.CalledProcessError):
        build()
    assert "error:" in capfd.readouterr().err


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts programs of these names and shell scripts on PATH, and nothing else."""

    def put(**scripts):
        for name, script in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "cxx -m64")
    monkeypatch.delenv("CLINATTN_CCACHE", raising=False)
    return put


def test_ccache_comes_before_the_compiler(programs, monkeypatch):
    programs(cxx="exit 0")
    assert toolchain.cached_compiler() == ["cxx", "-m64"]
    programs(ccache="exit 0")
    assert toolchain.cached_compiler() == ["ccache", "cxx", "-m64"]
    monkeypatch.setenv("CLINATTN_CCACHE", "0")
    assert toolchain.cached_compiler() == ["cxx", "-m64"]


@pytest.mark.parametrize("command", ["ccache cxx", "linked"])
def test_ccache_comes_once(programs, monkeypatch, tmp_path, command):
    programs(cxx="exit 0", ccache="exit 0")
    (tmp_path / "linked").symlink_to("ccache")
    monkeypatch.setenv("CXX", command)
    assert toolchain.cached_compiler() == shlex.split(command)


def test_a_ccache_that_fails_is_left_out(programs):
    programs(cxx="exit 0", ccache="exit 1")
    assert toolchain.cached_compiler() == ["cxx", "-m64"]


def test_a_result_is_kept_for_as_long_as_its_source_is_the_same(tmp_path):
    source, calls = tmp_path / "source", []

    def result(name):
        make = lambda: calls.append(name) or [name]
        return kept(tmp_path / "kept", name, digest(source, words=["1.0"]), make)

    source.write_text("first")
    for _ in range(2):
        assert result("sm90-pairs") == ["sm90-pairs"]
        assert result("sm90-pairs-causal") == ["sm90-pairs-causal"]
    assert calls == ["sm90-pairs", "sm90-pairs-causal"]
    source.write_text("second")
    result("sm90-pairs")
    assert len(calls) == 3
    assert len(list((tmp_path / "kept").iterdir())) == 3
    source.write_text("first")  # another branch, or another clone
    assert result("sm90-pairs") == ["sm90-pairs"] and len(calls) == 3
    for word in "abcdef":
        source.write_text(word)
        result("sm90-pairs")
    assert len(list((tmp_path / "kept").iterdir())) == 5  # four of that name


BUILDS = """
import sys
from pathlib import Path
from kept import one_at_a_time
with one_at_a_time(Path(sys.argv[1])):
    print("built")
"""


def test_a_process_waits_while_another_builds(tmp_path):
    command = [sys.executable, "-c", BUILDS, str(tmp_path / "folder")]
    env = os.environ | {"PYTHONPATH": str(LIB)}
    with one_at_a_time(tmp_path / "folder"):
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=3)
    assert process.communicate(timeout=60)[0] == "built\n"
