"""Peaks of instruction sets: facts of rows, and the doctor's advice on the variable."""

from __future__ import annotations

import pytest
import torch

from clinattn.backends.compiled import compiled_module
from clinattn.tools import peaks

BUILT = pytest.mark.skipif(compiled_module() is None, reason="the compiled backend is not built")

FAST = {"fp32": 2e11, "bf16": 4e11}


def scaled(fp32: float, bf16: float) -> dict[str, float]:
    return {"fp32": fp32 * FAST["fp32"], "bf16": bf16 * FAST["bf16"]}


@pytest.mark.parametrize("fp32, bf16", [(1.0, 1.0), (1.09, 0.5), (0.3, 1.09)])
def test_no_advice_below_the_margin(fp32, bf16):
    assert peaks.advice({"wide": FAST, "narrow": scaled(fp32, bf16)}, "wide") == []


def test_the_advice_names_the_variable_and_what_it_costs():
    (line,) = peaks.advice({"narrow": scaled(1.2, 0.5), "wide": FAST}, "wide")
    assert line.startswith("CLINATTN_CPU_ISA=narrow is faster here")
    assert "240 GFLOP/s in fp32 where wide has 200" in line
    assert "wide is the faster one in bf16" in line


def test_one_line_where_a_set_is_faster_in_both():
    (line,) = peaks.advice({"narrow": scaled(0.5, 0.5), "wide": FAST}, "narrow")
    assert "in fp32" in line and "in bf16" in line and "the faster one" not in line


def test_the_best_of_three_is_named():
    rates = {"a": FAST, "b": scaled(1.2, 1.0), "c": scaled(1.5, 1.0)}
    (line,) = peaks.advice(rates, "a")
    assert "CLINATTN_CPU_ISA=c" in line


@BUILT
def test_measuring_leaves_the_process_as_it_was(threads):
    module = compiled_module()
    threads(2)
    before = module.instruction_set()
    measured = peaks.measure()
    assert module.instruction_set() == before and torch.get_num_threads() == 2
    assert measured.peaks.keys() == measured.attention.keys() <= set(module.instruction_sets())
    assert before in measured.peaks
    for rates in (*measured.peaks.values(), *measured.attention.values()):
        assert set(rates) == set(peaks.DTYPES) and min(rates.values()) > 1e7


@BUILT
def test_the_slowest_set_is_measured_where_it_is_in_force(monkeypatch):
    module = compiled_module()
    slowest = module.instruction_sets()[0]
    module.set_instruction_set(slowest)
    monkeypatch.setattr(peaks, "TOKENS", 32)
    try:
        assert slowest in peaks.measure().peaks
    finally:
        module.set_instruction_set("")


@BUILT
def test_rows_carry_both_peaks(threads):
    threads(1)
    found = peaks.peaks_in_force()
    assert set(found) == {"peak_fp32_gflop_per_s", "peak_bf16_gflop_per_s"}
    assert min(found.values()) > 0.1


def test_without_the_compiled_module_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(peaks, "compiled_module", lambda: None)
    assert peaks.measure() is None and peaks.peaks_in_force() == {}
