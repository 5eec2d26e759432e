"""docs/guides/: the guides that use the command line, run as they stand."""

from __future__ import annotations

import guides
import pytest

for package in ("typer", "rich", "pyarrow", "matplotlib", "jinja2", "filelock"):
    pytest.importorskip(package)

GUIDES = guides.of_kind("commands")


@pytest.mark.parametrize("guide", GUIDES, ids=[guide.stem for guide in GUIDES])
def test_guide_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guides.run(guide, tmp_path)
