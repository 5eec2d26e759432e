"""bench/cpu/short.py: what the ratio is, what is shown first, and a small sweep end to end."""

import importlib
import json
import sys
from dataclasses import replace

import pytest

import clinattn

pytest.importorskip("rich")


@pytest.fixture(scope="module")
def program(bench_on_the_path):
    return importlib.import_module("cpu.short")


@pytest.fixture
def row(program):
    return program.Row(
        batch=2,
        heads=3,
        tokens=4,
        head_dim=8,
        dtype="fp32",
        passes="forward",
        ours_s=[2e-6, 4e-6, 2e-6],
        torch_s=[3e-6, 6e-6, 9e-6],
    )


def test_the_ratio_is_the_middle_of_the_rounds(row):
    assert (row.ours_us, row.torch_us) == pytest.approx((2, 6))
    assert row.ratio == pytest.approx(1.5)
    assert row.ns_per_pair == pytest.approx(2000 / (2 * 3 * 16))
    assert row.record()["ratio"] == row.ratio


def test_the_worst_come_first(program, row):
    slower = replace(row, tokens=77, torch_s=[1e-6] * 3)
    shown = program.worst([row, slower, row], shown=2)
    assert shown.row_count == 2 and list(shown.columns[1].cells) == ["77", "4"]
    assert program.summary([row, slower]).startswith("1 of 2 slower than torch")


def test_rounds_take_turns(program):
    order = []
    seconds = program.rounds_of([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert [len(x) for x in seconds] == [3, 3] and all(min(x) > 0 for x in seconds)
    timed = "".join(order)[18:]  # three times three calls of each to warm up
    assert timed.count("ba") == 2 and timed.count("ab") == 3


def test_the_sweep_spans_what_is_promised(program):
    for long in (False, True):
        shapes = list(program.shapes(long))
        heads = {batch * heads for batch, heads, _, _ in shapes}
        assert {1, 3072} <= heads and {32, 128} <= {dim for *_, dim in shapes}
        assert {1, 256} <= {n for _, _, n, _ in shapes}
    assert max(n for _, _, n, _ in shapes) == 1024


@pytest.mark.skipif(not clinattn.backends()["cpu"], reason="the compiled backend is not built here")
def test_a_sweep_end_to_end(program, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "BATCHES", ((1, 1), (2, 3)))
    monkeypatch.setitem(program.TOKENS, False, (1, 5))
    monkeypatch.setitem(program.DIMS, False, (8,))
    monkeypatch.setattr(program, "ROUND_S", 1e-5)
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["short.py", "--rounds", "2", "--json", str(path)])
    assert program.main() == 0
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 2 * 2 * 2 * 2 and content["cpu"]
    assert "of 16 slower than torch" in capsys.readouterr().out
