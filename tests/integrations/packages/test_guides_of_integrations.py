"""docs/guides/: the guides whose code needs transformers and its like, run as they stand."""

from __future__ import annotations

import guides
import pytest

GUIDES = guides.of_kind("integrations")


@pytest.mark.parametrize("guide", GUIDES, ids=[guide.stem for guide in GUIDES])
def test_guide_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guides.run(guide, tmp_path)
