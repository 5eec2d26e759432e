"""A build that loses its kernels fails and says what helps, unless none are asked for."""

import sys

import pytest
from building import extension, torch_here
from installs import copy_repository, run

NO_COMPILER = {"CXX": "/nonexistent/c++"}
BROKEN_COMPILER = """#!/bin/sh
case "$*" in *isa_*.cpp*) echo "this compiler is broken" >&2; exit 3;; esac
exec c++ "$@"
"""
PIP = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".")


@pytest.fixture
def tree(tmp_path):
    copy_repository(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken++"
    path.write_text(BROKEN_COMPILER)
    path.chmod(0o755)
    return {"CXX": str(path), "MAX_JOBS": "1", "CLINATTN_CCACHE": "0"}


def lost(tree, reason, **settings):
    """Checks that pip makes no wheel, and shows the reason and what helps."""
    done = run(sys.executable, *PIP, cwd=tree, check=False, **settings)
    said = done.stdout + done.stderr
    assert done.returncode, said
    assert reason in said
    for remedy in ("a wheel of clinattn", "CLINATTN_SKIP_EXT=1 with the same command"):
        assert remedy in said
    assert not list(tree.glob("dist/*.whl"))
    assert not list(tree.glob("**/libclinattn.so"))


def test_without_a_compiler(tree):
    lost(tree, "no C++ compiler: '/nonexistent/c++' is not on PATH", **NO_COMPILER)


def test_where_the_compiler_fails(tree, broken):
    lost(tree, "this compiler is broken", **broken)


def test_without_the_sources(tree):
    (tree / "csrc" / "facts.cpp").unlink()
    lost(tree, "the C++ sources are not part of this tree")


def test_what_is_asked_for_is_said(tree):
    done = run(sys.executable, *PIP, "-v", cwd=tree, CLINATTN_SKIP_EXT="1", **NO_COMPILER)
    assert "CLINATTN_SKIP_EXT=1, so no kernels are built" in done.stdout + done.stderr
    (wheel,) = tree.glob("dist/*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_library_of_an_earlier_build_is_removed(tree):
    earlier = tree / "clinattn" / "libclinattn.so"
    earlier.touch()
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    assert run(*build, cwd=tree, check=False, **NO_COMPILER).returncode
    assert not earlier.exists()


def test_without_torch_the_reason_names_it(monkeypatch):
    monkeypatch.setattr(extension, "torch_folder", lambda: None)
    assert "has no torch, against whose headers the kernels are compiled" in extension.missing()


def test_an_older_torch_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "torch_folder", lambda: tmp_path)
    assert "expected torch 2.11 or newer" in extension.missing()


def test_an_isolated_build_finds_the_torch_of_its_environment(monkeypatch):
    """pip hides the environment by PYTHONPATH and a sitecustomize; here torch alone is hidden."""
    expected = torch_here.torch_folder()
    real, hidden = torch_here.find_spec, [x for x in sys.path if x]
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(torch_here, "find_spec", lambda name: real(name) if sys.path else None)
    assert torch_here.torch_folder() == expected
    assert set(sys.path) & set(hidden)
