"""The page of `clinattn report`: every kind of results, alone and together, and nothing fetched."""

from __future__ import annotations

import copy
import json

import pytest
from pages import assert_self_contained, barriers
from places import BENCH
from results import ENCODER, RESULTS

pytest.importorskip("jinja2")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402
from clinattn.tools.report.charts import (  # noqa: E402
    LEFT,
    RIGHT,
    WIDTH,
    Bar,
    bar_chart,
    histogram,
    line_chart,
    rounded_steps,
    spread,
)
from clinattn.tools.report.page import ReportError, load_result, render  # noqa: E402
from clinattn.tools.report.sections import section  # noqa: E402

SHOWN = {
    "encoders": ["notes, up to 4,321", "3,140", "3.14", "25.0%"],
    "kernels": ["causal N4096 D64", "2.00", "61.2%", "30.6%", "2,000 (amx bf16)", "interrupted"],
    "compare": ["Against b45e", "2,000.000", "1,000.000"],
    "engines": ["3 of 22 layers", "12,346", "2.50", "NaN in tokens", "6.1e-03", "3,072", "41.0%"],
    "parity": ["1 of 2 model types", "2 of 3", "1.50", "has no attention", "some-model"],
    "pretrained": ["titles", "2.00 times as fast as torch SDPA", "2e-07", "6,173", "25.0%"],
    "suites": ["12,346", "11,111 to 13,333", "1.75", "as torch SDPA", "33.7%", "50.0%", "42.1"],
}
CHARTS = {"kernels": 1, "suites": 2}


@pytest.mark.parametrize("kind", RESULTS)
def test_each_kind_has_its_page(kind):
    html = render(RESULTS[kind])
    assert_self_contained(html)
    assert html.count('role="img"') == CHARTS.get(kind, 0)
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
    assert html.count("<h1>") == 1 and html.count('role="img"') == sum(CHARTS.values())
    assert html.count("<details>") == len(RESULTS) and f"({len(RESULTS)} of {len(RESULTS)})" in html
    titles = [section(result).title for result in RESULTS.values()]
    assert all(f">{title}</h2>" in html for title in titles)


def test_the_kept_rows_make_a_page():
    kept = BENCH / "results"
    kinds = ("cpu-kernels", "encoder", "against-transformers", "engines", "suites", "parity")
    kinds += ("pretrained",)
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
    "content", [{"rows": [{"mode": "train"}]}, {"benchmarks": [{}]}, {"schema": 2}, [], 7]
)
def test_json_of_no_known_kind_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="other.json' is no benchmark result: expected"):
        load_result(path)


@pytest.mark.parametrize(
    "content",
    [{"rows": []}, {"environment": {}, "left": {}, "rows": []}, {"benchmarks": []}]
    + [RESULTS[kind] | {"rows": []} for kind in RESULTS if kind != "suites"]
    + [RESULTS["suites"] | {"benchmarks": []}, ENCODER | {"rows": [], "interrupted": True}],
)
def test_a_file_without_rows_is_an_error(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="other.json' has no rows: expected a run that measured"):
        load_result(path)


def test_two_files_of_a_kind_have_titles_of_their_own():
    html = render(ENCODER, ENCODER, RESULTS["pretrained"], ENCODER)
    assert barriers(html) == []
    for number in (2, 3):
        assert html.count(f">Encoder throughput on clinical sequences ({number})</h2>") == 1


def test_lines_lie_on_logarithmic_axes():
    chart = line_chart(
        "t", {"a": [(1, 10), (100, 1000), (10, 100)], "alone": [(1, 5)]}, "tokens", "tokens/s"
    )
    (line,) = chart["lines"]
    assert line["name"] == "a"
    (x0, y0), (x1, y1), (x2, y2) = line["points"]
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1) and y0 > y2
    assert [text for _, text in chart["y_ticks"]] == ["10", "100", "1k"]
    assert "tokens/s by tokens" in chart["alternative"] and "1,000 at 100" in chart["alternative"]


@pytest.mark.parametrize(
    "points",
    [
        {},
        {"a": [(1, 2)]},
        {"a": [(1, 0), (2, 0)]},
        {"a": [(3, 1), (3, 2)]},
        {"a": [(1, 5e-324), (2, 5e-324)]},
    ],
    ids=["none", "one-point", "zeros", "one-length", "no-size"],
)
def test_what_is_no_line_is_not_drawn(points):
    assert line_chart("t", points, "x", "y") is None


def test_a_flat_line_has_an_axis():
    chart = line_chart("t", {"a": [(1, 100), (2, 100)]}, "x", "y")
    assert [text for _, text in chart["y_ticks"]] == ["100", "1k"]


def test_each_line_has_a_mark_of_its_own():
    names = [f"line {i}" for i in range(6)]
    chart = line_chart("t", {name: [(1, 1), (2, 2)] for name in names}, "x", "y")
    assert len({line["mark"] for line in chart["lines"]}) == 6
    assert len({line["color"] for line in chart["lines"]}) == 6


def test_bars_have_an_axis_and_are_in_words():
    bars = [Bar("a", 50, "line0", (40, 80)), Bar("b", 0, "line1")]
    chart = bar_chart("t", bars, "tokens a second", "{:,.0f}")
    assert [text for _, text in chart["x_ticks"]] == ["0", "20", "40", "60", "80"]
    assert chart["x_ticks"][-1][0] == chart["bars"][0]["high"] == chart["right"]
    assert chart["bars"][1]["width"] == 0
    assert chart["alternative"] == "tokens a second. a: 50; b: 0."


@pytest.mark.parametrize("largest", [1e-9, 0.3, 1, 7, 999, 1e30])
def test_steps_are_round_and_few(largest):
    found = rounded_steps(largest)
    assert found[0] == 0 and largest / 2 <= found[-1] <= largest * (1 + 1e-9)
    assert 2 <= len(found) <= 5
    assert f"{found[1]:.0e}"[0] in "125" and float(f"{found[1]:.0e}") == pytest.approx(found[1])


def test_a_histogram_has_both_axes_and_is_in_words():
    chart = histogram("Lengths", [0, 10, 20, 30], [3, 0, 6])
    assert [text for _, text in chart["x_ticks"]] == ["0", "10", "20", "30"]
    assert [text for _, text in chart["y_ticks"]] == ["0", "2", "4", "6"]
    assert "0 to 10 tokens: 3 sequences; 20 to 30 tokens: 6 sequences." in chart["alternative"]
    assert [column["height"] for column in chart["columns"]] == [100, 0, 200]


def test_ticks_are_few():
    assert spread([1, 2, 3]) == [1, 2, 3]
    assert spread(list(range(100))) == [0, 25, 50, 74, 99]
