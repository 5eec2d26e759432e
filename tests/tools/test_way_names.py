"""A way has one name: in the page, the plots, the terminal, README and docs."""

from __future__ import annotations

import re

import pytest
from places import BENCH, ROOT
from results import ENCODER, RESULTS

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from clinattn.tools.benchmark.variants import VARIANTS  # noqa: E402
from clinattn.tools.cli import show  # noqa: E402
from clinattn.tools.report import plots  # noqa: E402
from clinattn.tools.report.page import load_result, render  # noqa: E402
from clinattn.tools.report.sections import section  # noqa: E402
from clinattn.tools.ways import ATTENTION, LAYOUTS, dtype_name, pass_name, way_name  # noqa: E402

WAYS = ("torch SDPA, padded", "torch SDPA, length-bucketed", "clinattn, padded", "clinattn, packed")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("sdpa_padded",), "torch SDPA, padded"),
        (("sdpa_bucketed",), "torch SDPA, length-bucketed"),
        (("clinattn_bucketed",), "clinattn, length-bucketed"),
        (("torch", "padded"), "torch SDPA, padded"),
        (("torch", "sorted"), "torch SDPA, length-bucketed"),
        (("clinattn", "packed"), "clinattn, packed"),
        (("clinattn linear", "packed"), "clinattn with linear layers, packed"),
        (("openvino, finite masks", "sorted"), "OpenVINO, finite masks, length-bucketed"),
        (("onnxruntime", "padded"), "ONNX Runtime, padded"),
        (("sdpa",), "torch SDPA"),
        (("a_way", "tiled"), "a_way, tiled"),
        (("",), ""),
    ],
)
def test_names(parts, name):
    assert way_name(*parts) == name


def test_passes_and_dtypes_have_names():
    assert pass_name("train") == "training" and pass_name("forward") == "forward"
    assert dtype_name("float32") == "fp32" and dtype_name("bf16") == "bf16"


def test_the_encoder_has_these_four():
    assert tuple(variant.label for variant in VARIANTS) == WAYS


def test_page_plots_and_terminal_agree(monkeypatch, capsys, tmp_path):
    (figure,) = (draw(ENCODER_WITH_FACTS) for name, (draw, _) in plots.PLOTS.items()
                 if name == "throughput")  # fmt: skip
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == list(WAYS)
    assert figure.axes[0].get_title() == "training"
    page = section(ENCODER)
    (table,) = (table for table in page.tables if table.title == "Results")
    assert [row[:2] for row in table.rows] == [(way, "training") for way in WAYS]
    assert [bar["label"] for bar in page.charts[0]["bars"]] == list(WAYS)
    (agreement,) = (table for table in page.tables if table.title == "Agreement before timing")
    assert agreement.rows[0][0] == WAYS[0]
    settings = ENCODER["settings"] | {"preset": "tiny", "dtype": "float32"}
    show(ENCODER | {"settings": settings})
    said = capsys.readouterr().out
    column = [line.split("│")[1] for line in said.splitlines() if "│" in line]
    assert " ".join(" ".join(column).split()) == " ".join(WAYS)  # a narrow terminal wraps
    assert "training: 2.00 times by the kernels alone (clinattn, padded, over torch SDPA, p" in said
    assert "training: 1.50 times by packing alone (clinattn, packed, over clinattn, pad" in said


ENCODER_WITH_FACTS = ENCODER | {
    "rows": [
        row | {"preset": "tiny", "dtype": "float32", "max_tokens": 9, "workload": "notes"}
        for row in ENCODER["rows"]
    ]
}


def test_a_plot_has_its_numbers_in_words(tmp_path):
    plots.write_plots(ENCODER_WITH_FACTS, tmp_path)
    (title,) = re.findall("<title>(.*)</title>", (tmp_path / "throughput.svg").read_text())
    assert "training, real tokens/s, median and quartiles. torch SDPA, padded: 12,346;" in title
    assert title.endswith("clinattn, packed: 37,037")


def test_no_page_shows_an_identifier():
    """Every kind of kept rows, without the data at the end: no way by its name in the rows."""
    kept = {path.name.split("-20")[0]: path for path in sorted((BENCH / "results").glob("*.json"))}
    shown = [x for x in map(taken, kept.values()) if x is not None]
    assert len(shown) >= 7
    for result in (*shown, *RESULTS.values(), ENCODER):
        html = render(result).partition('<section aria-labelledby="data">')[0]
        cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", html)
        assert not {x for x in cells if re.fullmatch(r"(sdpa|clinattn)[_-]\w+|sdpa|eager", x)}
        assert not re.search(r"\b(sdpa|clinattn)_(padded|bucketed|packed)\b", html)


def taken(path):
    try:
        return load_result(path)
    except ValueError as error:
        assert "is no benchmark result" in str(error)
        return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_the_documentation_use_the_names(page):
    """A cell that begins as the name of a way, or is an identifier, is the name of a way."""
    names = set(ATTENTION.values())
    known = names | {f"{name}, {layout}" for name in names for layout in (*LAYOUTS.values(), "MiB")}
    identifiers = ATTENTION.keys() - names - {"torch"}  # which is a package too
    lines = [x for x in page.read_text(encoding="utf-8").splitlines() if x.startswith("| ")]
    cells = [cell.strip() for line in lines for cell in line.strip("|").split("|")]
    wrong = [
        cell
        for cell in cells
        if (cell in identifiers or re.match(r"(torch SDPA|clinattn),", cell)) and cell not in known
    ]
    assert wrong == []
