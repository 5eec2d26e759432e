"""Tests are collected where no optional package is installed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
# Modules that the extras "test" and "bench" do not install; integrations/packages is left
# out as a whole where these are missing (its conftest.py)
OPTIONAL = (
    "accelerate", "captum", "clinattn.integrations.transformers", "einops", "openvino", "opacus",
    "peft", "safetensors", "tokenizers", "transformers",
)  # fmt: skip
FILES = [
    path
    for folder in (TESTS, TESTS / "lib")
    for path in (folder.glob("*.py") if folder.name == "lib" else folder.rglob("test_*.py"))
    if "packages" not in path.parts
]


def optional_imports(source: str) -> list[str]:
    """The optional modules that a file imports when it is itself imported.

    What stands behind a call of pytest.importorskip does not count.
    """
    found = []
    for node in ast.parse(source).body:
        if "importorskip" in ast.unparse(node):
            break
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [name for name in names if f"{name}.".startswith(tuple(f"{x}." for x in OPTIONAL))]
    return found


def test_modules_of_tests_need_no_optional_package():
    found = {path.name: optional_imports(path.read_text()) for path in FILES}
    # a helper of integrations/packages, in lib/, may need what they need
    imported = {
        f"{name}.py"
        for path in FILES
        for name in re.findall(r"^from (\w+) import", path.read_text(), re.MULTILINE)
    }
    of_packages = {path.name for path in FILES if path.parent.name == "lib"} - imported
    assert {name: x for name, x in found.items() if x and name not in of_packages} == {}


def test_optional_imports_are_seen():
    assert optional_imports("from clinattn.integrations.transformers import x") != []
    assert optional_imports("from transformers import x\nimport torch") == ["transformers.x"]
    assert optional_imports("def f():\n    import transformers") == []
    skips = 'transformers = pytest.importorskip("transformers")\nfrom transformers import x'
    assert optional_imports(skips) == []
