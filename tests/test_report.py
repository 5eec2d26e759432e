"""The page of `clinattn report`: every kind of results, alone and together, and nothing fetched."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from pages import assert_self_contained

pytest.importorskip("jinja2")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from clinattn.cli import app  # noqa: E402
from clinattn.report import ReportError, load_result, render  # noqa: E402
from clinattn.report_tables import LEFT, RIGHT, WIDTH, line_chart, section, spread  # noqa: E402

FACTS = {
    "date": "2026-01-02T03:04:05+00:00",
    "clinattn": "0.1.0",
    "commit": "abcdef123456",
    "python": "3.12.0",
    "torch": "2.13.0",
    "cpu": "some processor",
    "gpu": None,
    "threads": 2,
}
RATE = {"median": 12345.6, "q1": 11111.1, "q3": 13333.3}


def kernel_row(length: int, dtype: str = "fp32") -> dict:
    measured = {"ours_s": [0.5], "torch_s": [1.0], "ours_ms": 500.0, "torch_ms": 1000.0}
    shares = {"ratio": 2.0, "ours_of_peak": 0.612, "torch_of_peak": 0.306, "peak": 2e12}
    named = {"case": f"causal N{length} D64", "dtype": dtype, "passes": "forward"}
    return FACTS | measured | shares | named | {"peak_loop": "amx bf16"}


def speed(kind: str, way: str, longest: int) -> dict:
    extra = {
        "kind": kind,
        "way": way,
        "tokens_per_s": RATE,
        "ratio_to_peer": None if way == "sdpa" else 1.75,
        "of_peak": 0.5,
        "padding_share": 0.337,
        "dtype": "float32",
        "passes": "forward",
        "longest": longest,
        "window": None,
    }
    return {"group": f"{kind} {longest}", "name": way, "extra_info": extra}


def memory(way: str, power: int) -> dict:
    peaks = {str(n): n**power for n in (512, 1024, 2048)}
    extra = {"kind": "memory", "way": way, "passes": "forward", "peak_bytes": peaks}
    return {"group": "memory", "name": way, "extra_info": extra}


def startup() -> dict:
    seconds = {"import clinattn": {"median": 0.0421, "q1": 0.04, "q3": 0.05}}
    extra = {"kind": "startup", "way": "clinattn", "seconds": seconds}
    return {"group": "startup", "name": "start", "extra_info": extra}


RESULTS = {
    "kernels": {"interrupted": True, "rows": [kernel_row(1024), kernel_row(4096)]},
    "compare": {
        "kind": "compare",
        "interrupted": False,
        "base": FACTS | {"commit": "b45e"},
        "here": FACTS,
        "rows": [
            {"case": "full", "dtype": "bf16", "passes": "backward", "base_s": [3.0, 1.0, 2.0],
             "here_s": [1.0, 1.0, 1.0], "ratio": 2.0}
        ],
    },
    "encoders": {
        "kind": "against_transformers",
        "environment": FACTS,
        "rows": [
            {"preset": "clinicalbert", "dtype": "bf16", "inputs": "notes", "layers": 12,
             "longest": 4321, "padding": 0.25, "ratio": 3.14,
             "tokens_per_s": {"transformers": 1000.0, "clinattn": 3140.0}}
        ],
    },
    "suites": {
        "machine_info": {"clinattn": FACTS},
        "datetime": "2026-01-03T00:00:00.123456+00:00",
        "benchmarks": [
            *(speed("attention", way, n) for way in ("clinattn-cpu", "sdpa") for n in (128, 512)),
            speed("encoder", "clinattn_packed", 300),
            memory("clinattn", 2),
            memory("eager", 3),
            startup(),
        ],
    },
}  # fmt: skip
SHOWN = {
    "encoders": ["notes, up to 4,321", "3,140", "3.14", "25.0%"],
    "kernels": ["causal N4096 D64", "2.00", "61.2%", "30.6%", "2,000 (amx bf16)", "interrupted"],
    "compare": ["Against b45e", "2000.000", "1000.000"],
    "suites": ["12,346", "11,111 to 13,333", "1.75", "over SDPA", "33.7%", "50.0%", "42.1"],
}
CHARTS = {"kernels": 1, "compare": 0, "encoders": 0, "suites": 2}


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
    assert html.count("<details>") == len(RESULTS) and "(4 of 4)" in html


def test_the_kept_rows_make_a_page():
    kept = Path(__file__).resolve().parent.parent / "bench" / "results"
    kinds = ("cpu-kernels", "encoder", "against-transformers", "suites")
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
