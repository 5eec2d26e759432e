"""The scripts that build and test with other compilers and other releases of torch."""

import sys

import compat
import compilers
import elsewhere
import pytest


def test_results_of_another_environment_are_counted(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import os, pytest\n"
        "def test_right(): assert os.environ['SETTING'] == 'here'\n"
        "def test_wrong(): assert 1 == 2, 'not the same'\n"
        "def test_left_out(): pytest.skip()\n"
    )
    result = elsewhere.run_tests(sys.executable, [str(tests)], tmp_path, SETTING="here")
    assert (result.passed, result.skipped) == (1, 1)
    assert [name for name, _ in result.failed] == ["test_wrong"]
    assert "not the same" in result.failed[0][1]
    broken = elsewhere.run_tests(sys.executable, ["--no-such-option"], tmp_path)
    assert broken.failed == [("pytest", "it ended with 4")]


def test_the_table_tells_failures_and_the_status(capsys):
    fine, failed = elsewhere.Result(3, 1, [], 2.0), elsewhere.failure("build", "no room")
    assert elsewhere.show(("torch",), [(("2.14.1",), fine)]) == 0
    assert elsewhere.show(("torch",), [(("2.14.1",), fine), (("2.15.0",), failed)]) == 1
    said = capsys.readouterr().out
    assert "2.15.0: build\n    no room" in said
    assert said.splitlines()[-1].split() == ["2.15.0", "0", "1", "0", "0"]


def test_a_compiler_is_listed_once(monkeypatch, tmp_path):
    names = ["g++-13", "clang++", "clang++-19.bak", "x86_64-linux-gnu-g++", "clang++-19"]
    for name in names:
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "g++").symlink_to("g++-13")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compilers.on_the_path() == ["clang++", "clang++-19", "g++"]
    assert compilers.try_compiler("g++-99").failed == [("compiler", "it is not on PATH")]


def test_a_copy_has_the_sources_alone(tmp_path):
    for _ in range(2):
        elsewhere.copy_sources(tmp_path)
    assert (tmp_path / "clinattn" / "kernels" / "forward.py").exists()
    assert (tmp_path / "csrc" / "facts.cpp").stat().st_mtime == (
        (elsewhere.ROOT / "csrc" / "facts.cpp").stat().st_mtime
    )
    assert (tmp_path / "clinattn" / "_C.py").exists()
    assert not list(tmp_path.glob("clinattn/*.so"))


def test_a_python_that_is_not_there_is_named(capsys):
    with pytest.raises(FileNotFoundError, match="Python 2.99 is neither on PATH nor"):
        compat.python_of("2.99")
    assert compat.main(["2.15.0"]) == 2
    assert "2.11.0:3.10" in capsys.readouterr().out


def test_the_tests_for_compilers_exist():
    assert [x for x in compilers.SELECTION if not (elsewhere.TESTS / x).exists()] == []
