"""The script of `make wheel`, and the workflow that builds the same elsewhere."""

import re
import zipfile

import pytest
import wheels
from places import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"


@pytest.mark.parametrize(
    "names, right",
    [
        (["clinattn/libclinattn.so"], True),
        ([], False),
        (["clinattn/libclinattn.so", "clinattn.libs/libc10-1a2b.so"], False),
        (["clinattn/libclinattn.so", "clinattn.libs/libgomp-1a2b.so.1"], False),
    ],
    ids=["right", "no-kernels", "torch's", "compiler's"],
)
def test_a_wheel_holds_one_library(tmp_path, names, right):
    path = tmp_path / "clinattn-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("clinattn/__init__.py", *names):
            archive.writestr(name, "")
    assert (wheels.wrong_with(path) is None) == right


def test_a_case_is_a_torch_and_a_python(capsys):
    assert wheels.main(["2.11.0"]) == 2
    assert "2.11.0:3.10" in capsys.readouterr().out


def test_a_wheel_that_lost_its_kernels_is_an_error(tmp_path, monkeypatch, capsys):
    path = tmp_path / "clinattn-0-py3-none-any.whl"
    zipfile.ZipFile(path, "w").close()
    monkeypatch.setenv("WHEEL", str(path))
    assert wheels.main([]) == 1
    assert "expected ['clinattn/libclinattn.so']" in capsys.readouterr().out


def test_the_workflow_tests_each_promised_torch():
    (cases,) = re.findall(r"case: \[(.*)\]", WORKFLOW.read_text())
    (promised,) = re.findall(r"^COMPAT \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    torch_of = lambda case: case.strip('"').split(":")[0]
    assert [*map(torch_of, cases.split(", "))] == [*map(torch_of, promised.split())]
    assert {case.strip('"').split(":")[1] for case in cases.split(", ")} == {
        "3.10", "3.11", "3.12", "3.13", "3.14",
    }  # fmt: skip


def test_no_library_of_torch_is_taken_into_a_wheel():
    settings = (ROOT / "pyproject.toml").read_text().partition("[tool.cibuildwheel]")[2]
    assert tuple(re.findall(r'--exclude "([^"]+)"', settings)) == wheels.OF_TORCH
