"""Promises: no network, no code from data, no folders in results, a citation of this version."""

from __future__ import annotations

import ast
import re

import pytest
from places import ROOT

import clinattn

INSTALLED = [
    *sorted((ROOT / "clinattn").rglob("*.py")),
    *sorted((ROOT / "kernels").rglob("*.py")),
    *sorted((ROOT / "build_support").rglob("*.py")),
    ROOT / "setup.py",
]
CSRC = [x for x in sorted((ROOT / "csrc").rglob("*")) if x.suffix in (".h", ".cpp", ".cu", ".cuh")]
NETWORK = {
    "aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket",
    "socketserver", "ssl", "urllib", "urllib3", "xmlrpc",
}  # fmt: skip
CODE_FROM_DATA = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {"eval", "exec", "hub.load", "load_url"}


def imports(tree: ast.AST) -> set[str]:
    """The packages that a module imports, anywhere in it, by their first name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def faults(source: str) -> list[str]:
    """What in a Python source breaks the promises."""
    tree = ast.parse(source)
    found = [f"import {name}" for name in sorted(imports(tree) & (NETWORK | CODE_FROM_DATA))]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in CALLS or called.endswith((".hub.load", ".load_url")):
            found.append(called)
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if given.get("allow_pickle") == "True":
            found.append(f"{called} with allow_pickle=True")
    return found


@pytest.mark.parametrize(
    "source, count",
    [
        ("import socket", 1),
        ("def f():\n    from urllib.request import urlopen", 1),
        ("import torch\ntorch.load(path)", 1),
        ("import torch\ntorch.load(path, weights_only=False)", 1),
        ("import torch\ntorch.load(path, weights_only=True)", 0),
        ("import pickle\nexec(text)", 2),
        ("np.load(path, allow_pickle=True)", 1),
        ("from .pickle import x\nmodel.eval()", 0),
    ],
)
def test_faults_are_seen(source, count):
    assert len(faults(source)) == count


def test_no_network_and_no_code_from_data():
    assert len(INSTALLED) > 100
    found = {}
    for path in INSTALLED:
        if broken := faults(path.read_text(encoding="utf-8")):
            found[path.relative_to(ROOT).as_posix()] = broken
    assert found == {}


def test_the_cpp_opens_no_connection():
    assert len(CSRC) > 20
    for path in CSRC:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include\s*<(sys/socket|netdb|curl|arpa|netinet)", text), path


def test_results_name_no_folder_of_a_machine():
    """Of data a result says the kind: a folder's name may be that of a ward, or of a study."""
    folder = re.compile(r"""["':= ]/(?:data|home|mnt|root|scratch|srv|tmp|Users|work)/""")
    assert folder.search('"data": "meds:/home/ward"') and not folder.search('"4/tmp/x"')
    files = [x for x in sorted((ROOT / "bench" / "results").rglob("*")) if x.is_file()]
    texts = {x.name: x.read_text(encoding="utf-8", errors="replace") for x in files}
    assert texts and [name for name, text in texts.items() if folder.search(text)] == []


def test_the_citation_is_of_this_version():
    """cffconvert --validate knows the schema; here are the fields that a release changes."""
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(": ", 1) for line in lines if re.match(r"[a-z-]+: ", line))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    (licence,) = re.findall(r'^license = "(.+)"$', project, re.MULTILINE)
    assert fields["version"] == version and fields["license"] == licence
    assert fields["cff-version"] == "1.2.0" and fields["message"] and fields["title"]
    assert clinattn.__version__ in (version, "0")
