"""The sentence that each page begins with, the gains by their parts, and the machine's load."""

from __future__ import annotations

import copy
import math

import pytest
from results import ENCODER, RATE, RESULTS, parity_row, pretrained_row

pytest.importorskip("jinja2")

from clinattn.tools.environment import environment, load_average  # noqa: E402
from clinattn.tools.gains import best_gains, gains  # noqa: E402
from clinattn.tools.other_work import load  # noqa: E402
from clinattn.tools.report.page import render  # noqa: E402
from clinattn.tools.report.section import set_against  # noqa: E402
from clinattn.tools.report.sections import section  # noqa: E402


def encoder(rates: dict[tuple[str, str], float], spread: float = 0.01) -> dict:
    """A result with these tokens/s by mode and way, quartiles a share of them away."""
    rows = []
    for (mode, variant), rate in rates.items():
        quartiles = {"median": rate, "q1": rate * (1 - spread), "q3": rate * (1 + spread)}
        row = copy.deepcopy(ENCODER["rows"][0]) | {"mode": mode, "variant": variant}
        rows.append(row | {"tokens_per_s": quartiles})
    return ENCODER | {"rows": rows}


FOUR = ("sdpa_padded", "sdpa_bucketed", "clinattn_padded", "clinattn_packed")


def of(*rates: float, mode: str = "train") -> dict[tuple[str, str], float]:
    return {(mode, way): rate for way, rate in zip(FOUR, rates, strict=True)}


def test_the_gain_of_kernels_is_apart_from_that_of_packing():
    rows = encoder(of(100, 120, 200, 300))["rows"]
    found = {gain.what: gain for gain in gains(rows)}
    assert [gain.ratio for gain in found.values()] == pytest.approx([2, 1.5, 3, 1.2, 2.5])
    kernels, packing = found["the kernels alone"], found["packing alone"]
    assert (kernels.way, kernels.over) == ("clinattn_padded", "sdpa_padded")
    assert (packing.way, packing.over) == ("clinattn_packed", "clinattn_padded")
    assert kernels.ratio * packing.ratio == pytest.approx(found["kernels and packing"].ratio)


def test_the_page_shows_both_gains():
    html = render(encoder(of(100, 120, 200, 300)))
    assert "<strong>2.00×</strong> by the kernels alone, in training" in html
    assert "<strong>1.50×</strong> by packing alone, in training" in html
    (table,) = (t for t in section(encoder(of(100, 120, 200, 300))).tables if "gain" in t.title)
    assert table.header == ("gain", "training", "of", "over")
    assert table.rows[0] == (
        "the kernels alone", "2.00 times", "clinattn, padded", "torch SDPA, padded"
    )  # fmt: skip


def test_the_fastest_of_each_side_are_set_against_each_other():
    (gain,) = best_gains(encoder(of(130, 120, 200, 150))["rows"])
    assert (gain.way, gain.over) == ("clinattn_padded", "sdpa_padded")
    assert gain.ratio == pytest.approx(200 / 130) and gain.apart


def test_the_first_sentence_is_of_the_fastest_ways():
    both = of(100, 120, 200, 300) | of(1000, 1500, 2000, 2400, mode="infer")
    assert section(encoder(both)).conclusion == (
        "clinattn, packed, is 2.50 times as fast in training and 1.60 times as fast in inference "
        "as torch SDPA, length-bucketed, the fastest way of torch."
    )
    html = render(encoder(both))
    body = html[html.index("<body>") :]
    assert body.index("2.50 times as fast in training") < body.index("<nav")


def test_a_loss_is_said_as_plainly():
    found = section(encoder(of(200, 250, 100, 200)))
    assert "is 0.80 times as fast in training" in found.conclusion


def test_a_gain_within_the_scatter_is_none():
    found = section(encoder(of(100, 120, 125, 130), spread=0.05))
    assert "1.08 times as fast in training, within the scatter of rounds, as" in found.conclusion
    (table,) = (t for t in found.tables if "gain" in t.title)
    assert table.rows[1][1] == "1.04 times (within the scatter)"


def test_a_way_without_a_rival_is_named():
    assert section(encoder({("infer", "clinattn_packed"): 5.0})).conclusion == (
        "Measured without a rival: clinattn, packed."
    )
    assert section(ENCODER | {"rows": []}).conclusion == "Nothing was measured."


def test_many_ratios_are_said_by_their_mean_and_their_ends():
    said = set_against("ours", [("a", 2.0), ("b", 0.5), ("c", 8.0), ("d", math.inf)], "x, padded")
    assert said == (
        "ours is 2.00 times as fast as x, padded, in the geometric mean of 3 cases, from 0.50 "
        "times (b) to 8.00 times (c)."
    )
    assert set_against("ours", [("a", 2.0)], "x") == "ours is 2.00 times as fast as x (a)."
    assert set_against("ours", [("a", 0.0)], "x") == "No case has a ratio."


def test_each_kind_has_a_sentence_of_its_own():
    said = {kind: section(result).conclusion for kind, result in RESULTS.items()}
    assert "Attention of clinattn is 2.00 times as fast as torch SDPA" in said["kernels"]
    assert "This tree is 2.00 times as fast as b45e" in said["compare"]
    assert said["engines"] == (
        "Of 1 load, each in one precision, the fastest is clinattn, packed, in 1."
    )
    assert "clinattn is 1.75 times as fast as torch SDPA" in said["suites"]
    assert said["parity"].startswith("1 of 2 model types give the results of their own attention")
    assert "; 1 other types could not be compared" in said["parity"]
    memory = RESULTS["suites"] | {"benchmarks": RESULTS["suites"]["benchmarks"][-3:]}
    assert section(memory).conclusion == (
        "At 2,048 tokens attention takes, forward, at its peak: clinattn 4 MiB, eager attention "
        "8,192 MiB."
    )


def test_failures_of_parity_come_first():
    rows = [parity_row("a", "fp32", 0.5), parity_row("b", "fp32", 0.9)]
    rows += [parity_row("c", "fp32", 1.5), parity_row("d", "fp32", math.nan)]
    found = section({"environment": {}, "rows": rows})
    assert [row[0] for row in found.tables[0].rows] == ["d", "c", "b", "a"]
    assert [row[2] for row in found.tables[0].rows] == ["no", "no", "yes", "yes"]
    assert "2 of 4 model types" in found.conclusion and len(found.tables) == 1


def test_pretrained_ratios_are_of_medians():
    row = pretrained_row("titles", "train")
    row["tokens_per_s"]["eager"] = {"median": RATE["median"] / 4, "q1": 1.0, "q3": 2.0}
    found = section({"environment": {}, "rows": [row | {"other_cpus": 0.5, "cpus": 2}]})
    assert found.tables[0].rows[0][-2:] == ("4.00", "2.00")
    assert "0.50 of the 2 CPUs" in found.load


def test_the_load_of_the_machine_is_said():
    rows = [{"other_cpus": x, "cpus": 4} for x in (0.0, 0.25, 3.0)]
    assert load(rows) == (
        "Other work kept 0.25 of the 4 CPUs busy beside the measurements: the median of 3 rows, "
        "of which the busiest says 3.00."
    )
    assert load([{"other_cpus": None}, {}]) is None
    assert "Other work kept 0.90 of the 2 CPUs busy" in render(ENCODER)
    assert "These rows do not say what else ran on the machine." in render(RESULTS["kernels"])
    html = render(ENCODER | {"environment": ENCODER["environment"] | {"load_average": 1.25}})
    assert ">load average at the start</th>" in html and ">1.25</td>" in html
    assert ">Load average</dt>" in html


def test_the_environment_has_the_load_at_the_start():
    found = environment()["load_average"]
    assert (found is None) == (load_average() is None)
    assert found is None or 0 <= found < 1e5
    assert environment()["load_average"] == found  # not that of this program's own work
