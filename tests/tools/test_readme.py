"""README and docs/: every snippet runs, and every command, file and link that they name exists.

Snippets that need other packages run in tests/integrations/packages/test_readme_snippets.py.
"""

from __future__ import annotations

import re
import sys

import pytest
from documentation import (
    ALWAYS_THERE,
    GUIDES,
    OF_INTEGRATIONS,
    PAGES,
    README,
    blocks,
    commands,
    indented,
    python_blocks,
    split,
)
from places import ROOT, TESTS

DOORS = {
    "## One call": "python",
    "## I have a transformers model": "python",
    "## I have timelines": "python",
    "## I have flash-attn code": "python",
    "## I want to measure": "sh",
}
HERE = python_blocks(integrations=False)
FOLDERS = ("bench", "build_support", "clinattn", "csrc", "docs", "examples", "kernels", "tests")
NAMED_FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w")
MADE_BY_RUNS = ("bench/out/",)
SET = r"(?:[A-Z_]+=\S+ +)*"
MAKE = re.compile(rf"^{SET}make +({SET})([a-z][a-z-]*)((?: +[A-Z_]+=\S*)*)", re.MULTILINE)
COMMAND = re.compile(r"(?:^|[\s/])clinattn +([a-z][a-z-]*)\b(.*)")
RANGES = {"step", "layer", "attention"}  # ranges of profilers are called "clinattn step", ...


def ids(page):
    return page.relative_to(ROOT).as_posix()


def sections():
    """The text below each heading of README."""
    parts = re.split(r"^(## .*)$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_readme_is_short_and_installing_comes_first():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    first_screen = "\n".join(lines[:25])
    for command in ("git clone", "make bench", "make test"):
        assert f"\n{command}" in first_screen


@pytest.mark.parametrize("heading, language", DOORS.items(), ids=list(DOORS))
def test_each_way_in_has_lines_to_run(heading, language):
    assert f"```{language}\n" in sections()[heading]


def test_no_snippet_is_left_out():
    """Else a block in another notation, or one that no test runs, would pass unseen."""
    elsewhere = python_blocks(integrations=True)
    run = [block.name for block in HERE + elsewhere]
    pages = [page for page in PAGES if page not in GUIDES]  # which test_guides.py runs
    shown = [block.name for page in pages for block in blocks(page, "python")]
    assert sorted(run) == sorted(shown)
    of_readme = [name for name in run if name.startswith("README.md:")]
    assert len(of_readme) == README.read_text(encoding="utf-8").count("```python\n") >= 4
    assert len(HERE) >= 6 and elsewhere
    known = ALWAYS_THERE | OF_INTEGRATIONS | sys.stdlib_module_names
    for block in HERE + elsewhere:
        assert block.packages() <= known, block.name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_blocks_say_what_they_are(page):
    assert {block.language for block in split(page)[0]} <= {"python", "sh"}
    for line in indented(page):
        assert not re.match(r"(from \S+ )?import ", line), f"Python outside a python block: {line}"
    if page == README:
        assert not indented(page)


@pytest.mark.parametrize("block", HERE, ids=[block.name for block in HERE])
def test_snippet_runs(block):
    block.run()


def test_the_first_snippet_leaves_gradients():
    namespace = blocks(README, "python")[0].run()
    for name in "qkv":
        x = namespace[name]
        assert x.is_leaf and x.grad.shape == x.shape and x.grad.abs().sum() > 0


def test_make_has_the_targets_and_variables():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    found = set()
    for page in PAGES:
        for before, target, after in MAKE.findall("\n".join(commands(page))):
            assert target in targets, f"{ids(page)}: make {target}"
            found.add(target)
            for name in re.findall(r"[A-Z_]+(?==)", before + after):
                assert f"$({name})" in makefile, f"{ids(page)}: make {target} {name}="
    assert found >= {"bench", "test", "test-all", "test-elsewhere", "gpu"}


def test_clinattn_has_the_commands_and_options():
    typer = pytest.importorskip("typer")
    for package in ("rich", "pyarrow", "matplotlib"):
        pytest.importorskip(package)
    from clinattn.tools.cli import app

    options = {
        name: {"--help", *(x for parameter in command.params for x in parameter.opts)}
        for name, command in typer.main.get_command(app).commands.items()
    }
    found = set()
    for page in PAGES:
        for name, rest in (x for line in commands(page) for x in COMMAND.findall(line)):
            if name in RANGES:
                continue
            assert name in options, f"{ids(page)}: clinattn {name}"
            found.add(name)
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
                assert option in options[name], f"{ids(page)}: clinattn {name} {option}"
    assert found == set(options)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in NAMED_FILE.findall(text):
        if not name.startswith(MADE_BY_RUNS):
            assert any(ROOT.glob(name)), name
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_variables_are_read_somewhere():
    sources = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder in ("bench", "build_support", "clinattn", "csrc", "kernels", "tests"):
        sources += [x for x in (ROOT / folder).rglob("*") if x.suffix in (".py", ".cpp", ".h")]
    known = set()
    for path in sources:
        known |= set(re.findall(r"CLINATTN_[A-Z_]+", path.read_text(encoding="utf-8")))
    for page in PAGES:
        named = set(re.findall(r"CLINATTN_[A-Z_]+", page.read_text(encoding="utf-8")))
        assert named <= known, ids(page)


def test_what_is_installed_has_no_switch_for_tests():
    page = (ROOT / "docs" / "variables.md").read_text(encoding="utf-8")
    of_tests = set(re.findall(r"CLINATTN_[A-Z_]+", page.partition("For tests:")[2]))
    read = set()
    for path in (ROOT / "clinattn").rglob("*.py"):
        read |= set(re.findall(r"CLINATTN_[A-Z_]+", path.read_text(encoding="utf-8")))
    assert of_tests and read and not read & of_tests
    assert not [name for name in read if re.search("EMULAT|POISON", name)]


def test_the_index_lists_every_page():
    index = ROOT / "docs" / "README.md"
    listed = re.findall(r"^- \[\S+\]\((\S+\.md)\)", index.read_text(encoding="utf-8"), re.MULTILINE)
    pages = [page for page in PAGES if page.is_relative_to(index.parent) and page != index]
    assert sorted(listed) == sorted(page.relative_to(index.parent).as_posix() for page in pages)


def test_the_map_and_the_tiers_name_what_is_there():
    text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    there = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py\b", text)) <= there
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "._"}
    page = (ROOT / "docs" / "tests.md").read_text(encoding="utf-8")
    for folder in folders:
        assert f"{folder}/" in text, folder
        assert re.search(rf"`(tests/)?{folder}`", page), folder
