"""The table of docs/parity.md is that of the kept rows, which are complete and passed."""

import json

import pytest
from places import ROOT

transformers = pytest.importorskip("transformers")

from parity_table import (  # noqa: E402
    DTYPES,
    MODES,
    Row,
    compare_architecture,
    left_table,
    parity_table,
    read_rows,
    write_rows,
)
from small_models import NotServed, model_types, small_architecture  # noqa: E402

from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.tools.model_report.architectures import REPLACED  # noqa: E402

KEPT_ROWS = sorted(ROOT.glob("bench/results/parity-*.json"), key=lambda path: path.stem[-10:])
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

LEFT_TABLE = """\
| reason | number | model types |
| --- | ---: | --- |
| a decoder | 1 | `gptj` |
| has no attention | 2 | `fnet`, `focalnet` |"""


def test_a_line_holds_the_worst_of_an_architecture(tmp_path):
    path = tmp_path / "rows.json"
    left = {"fnet": "has no attention", "gptj": "a decoder", "focalnet": "has no attention"}
    write_rows(path, ROWS, {"torch": "2"}, left)
    rows, reasons = read_rows(path)
    assert parity_table(rows) == TABLE
    assert left_table(reasons) == LEFT_TABLE


@pytest.mark.skipif(not KEPT_ROWS, reason="no bench/results/parity-*.json")
def test_the_page_shows_the_kept_rows():
    rows, left = read_rows(KEPT_ROWS[-1])
    chosen = {architecture.name for architecture in REPLACED}
    compared = {
        (row.architecture, row.dtype, row.mode, row.padding)
        for row in rows
        if row.architecture in chosen
    }
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
    assert parity_table(rows) in page and left_table(left) in page
    types = len({row.architecture for row in rows})
    assert f"{types} model types are compared" in " ".join(readme.split())


@pytest.mark.skipif(not KEPT_ROWS, reason="no bench/results/parity-*.json")
def test_every_type_of_transformers_is_compared_or_left_with_a_reason():
    rows, left = read_rows(KEPT_ROWS[-1])
    compared = {row.architecture.replace("-", "_") for row in rows}
    assert not compared & {name.replace("-", "_") for name in left}
    listed = compared | {name.replace("-", "_") for name in left}
    missing = {name.replace("-", "_") for name in model_types()} - listed
    kept = json.loads(KEPT_ROWS[-1].read_text())["environment"]["transformers"]
    if kept != transformers.__version__:
        pytest.skip(f"the rows are of transformers {kept}")
    assert not missing


@pytest.mark.parametrize("name", ["ernie", "opt", "deepseek_v3", "hubert", "siglip_vision_model"])
def test_a_type_is_made_small_by_its_names(name):
    if name not in model_types():
        pytest.skip("this release does not have it")
    row = compare_architecture(small_architecture(name), "fp32", "train", "none", replace_attention)
    assert row.replaced == row.attentions > 0 and row.calls > 0 and row.passed, row


@pytest.mark.parametrize("name, reason", [("llava", "several models"), ("swin", "several sizes")])
def test_a_type_that_cannot_be_made_small_says_why(name, reason):
    with pytest.raises(NotServed, match=reason):
        small_architecture(name)
