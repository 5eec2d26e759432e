"""The table of docs/parity.md is that of the kept rows, which are complete and passed."""

import pytest
from places import ROOT

pytest.importorskip("transformers")

from parity_table import (  # noqa: E402
    DTYPES,
    MODES,
    Row,
    parity_table,
    read_rows,
    write_rows,
)

from clinattn.tools.model_report.architectures import REPLACED  # noqa: E402

KEPT_ROWS = sorted(ROOT.glob("bench/results/parity-*.json"))
ROWS = [
    Row("bert", "BertModel", dtype, mode, padding, 2, 2, 2, outputs, gradients, "x", True)
    for dtype, mode, padding, outputs, gradients in (
        ("fp32", "train", "left", 0.25, 0.5),
        ("fp32", "eval", "right", 0.375, None),
        ("bf16", "train", "left", 0.125, 0.75),
    )
]
TABLE = """\
| model type | class | replaced | fp32 outputs | fp32 gradients | bf16 outputs | bf16 gradients | padding |
| --- | --- | --- | ---: | ---: | ---: | ---: | --- |
| `bert` | `BertModel` | 2 of 2 | 0.38 | 0.50 | 0.12 | 0.75 | left, right |"""  # noqa: E501


def test_a_line_holds_the_worst_of_an_architecture(tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, ROWS, {"torch": "2"})
    assert parity_table(read_rows(path)) == TABLE


@pytest.mark.skipif(not KEPT_ROWS, reason="no bench/results/parity-*.json")
def test_the_page_shows_the_kept_rows():
    rows = read_rows(KEPT_ROWS[-1])
    compared = {(row.architecture, row.dtype, row.mode, row.padding) for row in rows}
    assert compared == {
        (architecture.name, dtype, mode, padding)
        for architecture in REPLACED
        for padding in architecture.paddings
        for dtype in DTYPES
        for mode in MODES
    }
    assert all(row.passed for row in rows)
    readme, page = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/parity.md")
    )
    assert parity_table(rows) in page
    assert f"compares {len(REPLACED)} model types" in readme
