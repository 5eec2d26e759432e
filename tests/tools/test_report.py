"""The page of `clinattn report`: every kind of results, alone and together, and nothing fetched."""

from __future__ import annotations

import copy
import json

import pytest
from pages import assert_self_contained
from places import BENCH
from results import RESULTS

pytest.importorskip("jinja2")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402
from clinattn.tools.report.page import ReportError, load_result, render  # noqa: E402
from clinattn.tools.report.tables import (  # noqa: E402
    LEFT,
    RIGHT,
    WIDTH,
    line_chart,
    section,
    spread,
)

SHOWN = {
    "encoders": ["notes, up to 4,321", "3,140", "3.14", "25.0%"],
    "kernels": ["causal N4096 D64", "2.00", "61.2%", "30.6%", "2,000 (amx bf16)", "interrupted"],
    "compare": ["Against b45e", "2000.000", "1000.000"],
    "engines": ["3 of 22 layers", "12,346", "2.50", "NaN in tokens", "6.1e-03", "3,072", "41.0%"],
    "suites": ["12,346", "11,111 to 13,333", "1.75", "over SDPA", "33.7%", "50.0%", "42.1"],
}
CHARTS = {"kernels": 1, "compare": 0, "encoders": 0, "engines": 0, "suites": 2}


@pytest.mark.parametrize("kind", RESULTS)
def test_each_kind_has_its_page(kind):
    html = render(RESULTS[kind])
    assert_self_contained(html)
    assert html.count("<svg") == CHARTS[kind]
    for words in (*SHOWN[kind], "some processor", "2.13.0", "abcdef123456"):
        assert words in html.partition("<details")[0], words


def test_several_share_a_page(tmp_path):
    for kind, result in RESULTS.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(result))
    files = [str(tmp_path / f"{kind}.json") for kind in RESULTS]
    done = CliRunner().invoke(app, ["report", *files])
    assert done.exit_code == 0, done.output
    html = (tmp_path / "report.html").read_text()
    assert_self_contained(html)
    assert html.count("<h1>") == len(RESULTS) and html.count("<svg") == sum(CHARTS.values())
    assert html.count("<details>") == len(RESULTS) and "(5 of 5)" in html


def test_the_kept_rows_make_a_page():
    kept = BENCH / "results"
    kinds = ("cpu-kernels", "encoder", "against-transformers", "engines", "suites")
    measured = [x for kind in kinds for x in kept.glob(f"{kind}-*.json")]
    results = [load_result(path) for path in sorted(measured)]
    assert results
    assert_self_contained(render(*results))


def test_what_is_shown_is_escaped():
    changed = copy.deepcopy(RESULTS["kernels"])
    changed["rows"][0]["case"] = changed["rows"][0]["cpu"] = "<script>alert(1)</script>"
    html = render(changed)
    assert_self_contained(html)
    assert "&lt;script&gt;" in html


def test_facts_may_be_missing():
    changed = copy.deepcopy(RESULTS["kernels"])
    changed["rows"][0]["commit"] = None  # outside a repository
    del changed["rows"][0]["date"]
    assert_self_contained(render(changed))


@pytest.mark.parametrize(
    "content", [{"rows": []}, {"rows": [{"mode": "train"}]}, {"benchmarks": []}, {"schema": 2}]
)
def test_json_of_no_known_kind_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="other.json' is no benchmark result: expected"):
        load_result(path)


def test_lines_lie_on_logarithmic_axes():
    chart = line_chart("t", {"a": [(1, 10), (100, 1000), (10, 100)], "alone": [(1, 5)]})
    (line,) = chart["lines"]
    assert line["name"] == "a"
    (x0, y0), (x1, y1), (x2, y2) = line["points"]
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1) and y0 > y2
    assert [text for _, text in chart["y_ticks"]] == ["10", "100", "1k"]


@pytest.mark.parametrize(
    "points",
    [{}, {"a": [(1, 2)]}, {"a": [(1, 0), (2, 0)]}, {"a": [(3, 1), (3, 2)]}],
    ids=["none", "one-point", "zeros", "one-length"],
)
def test_what_is_no_line_is_not_drawn(points):
    assert line_chart("t", points) is None


def test_a_flat_line_has_an_axis():
    chart = line_chart("t", {"a": [(1, 100), (2, 100)]})
    assert [text for _, text in chart["y_ticks"]] == ["100", "1k"]


def test_ticks_are_few():
    assert spread([1, 2, 3]) == [1, 2, 3]
    assert spread(list(range(100))) == [0, 25, 50, 74, 99]


def test_an_unknown_result_has_no_section():
    assert section({"rows": [{"case": "x"}]}) is None
