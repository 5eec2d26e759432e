"""The snippets of README and docs/ that need other packages run; tests/tools has the others."""

from __future__ import annotations

import pytest
from documentation import README, python_blocks

BLOCKS = python_blocks(integrations=True)


def test_there_are_some():
    assert any(block.page == README for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_snippet_runs(block):
    block.run()


def test_the_model_of_the_readme_is_replaced(capsys):
    (block,) = (block for block in BLOCKS if block.page == README)
    hidden = block.run()["hidden"]
    assert hidden.isfinite().all()
    assert "2 attention modules replaced, 0 kept" in capsys.readouterr().out
