"""What doctor says of the install, and what a shell completes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from places import ROOT

for package in ("typer", "rich"):
    pytest.importorskip(package)

from clinattn.tools import installation  # noqa: E402
from clinattn.workloads.profiles import PROFILES  # noqa: E402


class Installed:
    def __init__(self, **texts):
        self.texts = texts

    def read_text(self, name):
        return self.texts.get(name.replace(".json", ""))


WHEEL = "Wheel-Version: 1.0\nTag: py3-none-manylinux_2_28_x86_64\n"
EDITABLE = json.dumps({"url": "file:///x", "dir_info": {"editable": True}})


@pytest.mark.parametrize(
    "texts, expected",
    [
        ({"WHEEL": WHEEL}, "from a wheel, py3-none-manylinux_2_28_x86_64"),
        ({"WHEEL": WHEEL, "direct_url": EDITABLE}, "built in the source tree"),
    ],
    ids=["wheel", "editable"],
)
def test_where_the_kernels_come_from(monkeypatch, texts, expected):
    monkeypatch.setattr(installation, "compiled_module", lambda: object())
    monkeypatch.setattr(installation, "distribution", lambda name: Installed(**texts))
    assert installation.kernels() == expected


def test_kernels_that_are_missing(monkeypatch):
    monkeypatch.setattr(installation, "compiled_module", lambda: None)
    monkeypatch.setattr(installation, "extension_error", "no such file")
    assert installation.kernels() == "missing: no such file"


@pytest.mark.parametrize("version, tested", [("2.15.3+cpu", True), ("2.16.0", False)])
def test_a_torch_newer_than_the_tests_is_named(monkeypatch, version, tested):
    monkeypatch.setattr(installation.torch, "__version__", version)
    hint = installation.untested_torch()
    assert hint is None if tested else hint.startswith(f"torch {version} is newer")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("clinattn rep", {"report", "report-model"}),
        ("clinattn bench --preset clinicalb", {"clinicalbert"}),
        ("clinattn bench --profile note_", {"note_discharge", "note_chunks"}),
        ("clinattn profile --data profile:ehr_i", {"profile:ehr_icu"}),
        ("clinattn profile --variant clinattn_pac", {"clinattn_packed"}),
    ],
)
def test_a_shell_completes_commands_and_choices(words, expected, tmp_path):
    env = os.environ | {
        "_CLINATTN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "clinattn"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "words, expected",
    [("--preset clinicalb", "clinicalbert"), ("--profile ehr_i", "ehr_icu")],
)
def test_bash_completes_with_what_the_command_gives_it(words, expected, tmp_path):
    command = tmp_path / "clinattn"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m clinattn "$@"\n')
    command.chmod(0o755)
    script = f"""
        eval "$(_CLINATTN_COMPLETE=source_bash clinattn)"
        COMP_WORDS=(clinattn bench {words}) COMP_CWORD=3
        _clinattn_completion clinattn
        echo "${{COMPREPLY[@]}}"
    """
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.stdout.split() == [expected], done.stderr


def test_shells_that_show_them_get_the_phrases(tmp_path):
    env = os.environ | {
        "_CLINATTN_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_ARGS": "clinattn bench --profile fix",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    command = [sys.executable, "-m", "clinattn"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.split("\t") == ["fixed", PROFILES["fixed"].description + "\n"]
