"""docs/guides/: every block runs, in the order of its page, or says why it does not.

Guides with commands run in commands/test_guides_with_commands.py, those that need transformers in
tests/integrations/packages/test_guides_of_integrations.py.
"""

from __future__ import annotations

import shutil
import subprocess

import guides
import pytest
from documentation import GUIDES
from places import ROOT


def name(guide):
    return guide.stem


def test_each_guide_is_run_once():
    kinds = [guides.of_kind(kind) for kind in ("plain", "commands", "integrations")]
    assert sorted(sum(kinds, [])) == GUIDES


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_what_is_not_run_says_why_and_parses(guide):
    found = guides.all_blocks(guide)
    assert [block for block in found if not block.not_run], "nothing of this guide is run"
    for block in found:
        assert block.language in ("python", "sh"), block.name
        assert block.not_run in {None, *guides.REASONS}, block.name
        if block.language == "python":
            compile(block.code, block.name, "exec")
        elif bash := shutil.which("bash"):
            done = subprocess.run([bash, "-n"], input=block.code, text=True, capture_output=True)
            assert done.returncode == 0, f"{block.name}: {done.stderr}"


@pytest.mark.parametrize("guide", guides.of_kind("plain"), ids=name)
def test_guide_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guides.run(guide, tmp_path)


def test_a_block_that_fails_fails_its_guide(tmp_path, monkeypatch):
    """Commands that fail, and Python that raises, are errors; a later block sees an earlier one."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "guides" / "of_a_test.md"
    text = "```sh\necho 3 > x\n```\n\n```python\nassert int(open('x').read()) == {}\n```\n"
    monkeypatch.setattr(guides, "all_blocks", lambda guide: parsed(tmp_path, guide, text, 3))
    guides.run(page, tmp_path)
    monkeypatch.setattr(guides, "all_blocks", lambda guide: parsed(tmp_path, guide, text, 4))
    with pytest.raises(AssertionError):
        guides.run(page, tmp_path)
    commands = "```sh\nfalse | cat\necho done\n```\n"
    monkeypatch.setattr(guides, "all_blocks", lambda guide: parsed(tmp_path, guide, commands))
    with pytest.raises(AssertionError, match="of_a_test"):
        guides.run(page, tmp_path)
    marked = f"<!-- not run: takes minutes -->\n{commands}"
    monkeypatch.setattr(guides, "all_blocks", lambda guide: parsed(tmp_path, guide, marked))
    guides.run(page, tmp_path)


def parsed(folder, page, text, *values):
    """The blocks of a text, as if they were those of a page."""
    path = folder / "page.md"
    path.write_text(text.format(*values) if values else text)
    return [block._replace(page=page) for block in guides.split(path)[0]]
