"""The files of bench/ import each other one way, under names that hide no other module."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest
from places import BENCH

FILES = {
    ".".join(path.relative_to(BENCH).with_suffix("").parts): path
    for path in sorted(BENCH.glob("**/*.py"))
    if path.name != "__init__.py"
}
# The folders, and for each what it may import of bench/ beside its own files.
ROOMS = {
    "gpu": set(),
    "suites": {"base_tree"},
    "cpu": {"base_tree", "rows_file", "suites.problem"},
    "models": {"rows_file", "turns"},
    "scaling": {"rows_file"},
}
COMMANDS = {"gpu.run", "gpu.pack", "gpu.plan", "gpu.plot", "gpu.adopt", "cpu.run", "cpu.compare"}


def imported(text: str) -> set[str]:
    """The files of bench/ that a module imports, anywhere in it, those for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


IMPORTS = {name: imported(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def stages() -> set[str]:
    """The modules with a function that gpu/run.py names in one of its tables of stages."""
    tree = ast.parse(FILES["gpu.run"].read_text(encoding="utf-8"))
    calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and len(x.args) == 2]
    of_stages = [x.args[0] for x in calls if getattr(x.func, "id", "") == "Stage"]
    return {f"gpu.{x.value.id}" for x in of_stages}


def test_the_files_are_read():
    """The other tests would pass on no file, and on imports that are not recognised."""
    assert set(ROOMS) == {name.split(".")[0] for name in FILES if "." in name}
    assert len(FILES) > 40 and sum(map(len, IMPORTS.values())) > 100
    assert imported("def f():\n    import gpu.bits") == {"gpu.bits"}
    assert imported("from gpu import bits, jobs") == {"gpu.bits", "gpu.jobs"}
    assert imported("from gpu.jobs import all_of\nimport rows_file, torch") == {
        "gpu.jobs", "rows_file",
    }  # fmt: skip


def test_there_is_no_circle():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError
    assert sorted(order) == sorted(FILES)


@pytest.mark.parametrize("room", ROOMS)
def test_a_folder_imports_its_own_files_and_few_others(room):
    ours = [name for name in FILES if name.startswith(f"{room}.")]
    others = {x for name in ours for x in IMPORTS[name] if not x.startswith(f"{room}.")}
    assert others == ROOMS[room]


def test_no_file_imports_a_command():
    assert COMMANDS <= FILES.keys()
    assert not COMMANDS & set().union(*IMPORTS.values())


def test_a_stage_imports_no_other_stage():
    found = stages()
    assert len(found) > 10 and found <= FILES.keys()
    assert {name for name in FILES if IMPORTS[name] & found} == {"gpu.run", "gpu.launches"}
    assert not IMPORTS["gpu.rows"]


@pytest.mark.parametrize("folder", [BENCH, *(BENCH / room for room in ROOMS)], ids=lambda x: x.name)
def test_no_name_hides_another_module(folder: Path):
    """The folder of a script comes first on sys.path: profile.py would stand in for Python's."""
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py"}
    names -= {"__init__"}
    assert names and not names & {*sys.stdlib_module_names, "clinattn", "kernels", "torch"}
