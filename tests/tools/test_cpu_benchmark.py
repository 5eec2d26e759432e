"""bench/cpu: counts of FLOP, verdicts, kept rows, a small case end to end, and the peak."""

import importlib
import json
from dataclasses import replace

import pytest
import torch

import clinattn

pytest.importorskip("rich")

FACTS = {"cpu": "some processor", "threads": 2, "instruction_set": "amx"}


@pytest.fixture(scope="module")
def problem(bench_on_the_path):
    return importlib.import_module("suites.problem")


@pytest.fixture(scope="module")
def cases(bench_on_the_path):
    return importlib.import_module("cpu.cases")


@pytest.fixture(scope="module")
def rows(bench_on_the_path):
    return importlib.import_module("cpu.rows")


@pytest.fixture(scope="module")
def program(bench_on_the_path):
    return importlib.import_module("cpu.measure")


@pytest.fixture
def row(rows):
    return rows.Row(
        case="full",
        dtype="fp32",
        passes="forward",
        flops=6 * 10**9,
        ours_s=[0.5, 0.01, 0.02],
        torch_s=[0.03, 0.03, 9.0],
        peak=6e11,
        peak_loop="avx512 fma",
        target=1.5,
        environment=FACTS,
    )


@pytest.mark.parametrize("lengths", [(1,), (9,), (7, 1, 12)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 3, 50])
def test_flops_count_the_visible_pairs(problem, lengths, is_causal, window):
    case = problem.AttentionCase(lengths, heads=3, head_dim=5, window=window, is_causal=is_causal)
    pairs = 0
    for n in lengths:
        ahead = torch.arange(n) - torch.arange(n)[:, None]
        visible = ahead.abs() <= (n if window is None else window)
        pairs += int((visible & (ahead <= 0)).sum() if is_causal else visible.sum())
    assert case.flops("forward") == 4 * 3 * 5 * pairs
    assert case.flops("backward") == 10 * 3 * 5 * pairs
    assert case.flops("forward_backward") == 14 * 3 * 5 * pairs


def test_fewer_heads_keep_the_groups(problem):
    case = problem.AttentionCase((4,), heads=8, head_dim=2)
    assert case.with_heads(2) == replace(case, heads=2)
    grouped = replace(case, kv_heads=2)
    assert grouped.with_heads(1) == replace(grouped, heads=4, kv_heads=1)
    assert grouped.with_heads(8) == grouped


def test_medians_decide(rows, row):
    assert (row.ours_ms, row.torch_ms) == (20, 30)
    assert row.ratio == 1.5 and row.met and rows.verdict(row) == "met"
    assert row.ours_gflops == pytest.approx(300) and row.ours_of_peak == pytest.approx(0.5)
    assert row.torch_gflops == pytest.approx(200) and row.torch_of_peak == pytest.approx(1 / 3)
    missed, without = replace(row, target=1.51), replace(row, target=None)
    assert missed.met is False and "missed" in rows.verdict(missed)
    assert without.met is None and rows.verdict(without) == ""
    assert rows.summary([row, missed, without]) == "1 of 2 targets met"


def test_rows_survive_json(rows, row, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows.content([row, replace(row, target=None)], interrupted=True)))
    assert rows.read_json(path) == [row, replace(row, target=None)]
    content = json.loads(path.read_text())
    assert content["interrupted"]
    assert content["rows"][0].items() >= {**FACTS, "ratio": 1.5, "met": True}.items()


def test_the_table_has_a_line_for_each_row(rows, row):
    assert rows.table([row, row, row]).row_count == 3
    assert rows.table([]).row_count == 0


def test_the_filter_wants_every_word(cases):
    found = list(cases.chosen(cases.ENTRIES, "window bf16 back"))
    assert [(e.name, dtype, passes) for e, dtype, passes in found] == [
        ("window 128 of 8192", "bf16", ["backward"])
    ]
    everything = list(cases.chosen(cases.ENTRIES, ""))
    assert len(everything) == sum(len(entry.targets) for entry in cases.ENTRIES)
    assert all(passes == ["forward", "backward"] for *_, passes in everything)
    assert not list(cases.chosen(cases.ENTRIES, "no such case"))


def test_cases_have_names_of_their_own_and_targets_for_both_passes(cases):
    names = [entry.name for entry in cases.ENTRIES]
    assert len(set(names)) == len(names)
    (full,) = (entry for entry in cases.ENTRIES if entry.name == "full N1024 D64")
    assert (full.target("fp32", "forward"), full.target("bf16", "backward")) == (1.25, 4)
    (gqa,) = (entry for entry in cases.ENTRIES if entry.name.startswith("gqa"))
    assert gqa.target("fp32", "forward") is None


def test_rounds_interleave(program):
    order = []
    works = {name: lambda name=name: order.append(name) for name in ("ours", "torch")}
    seconds = program.in_turns(works, 4)
    assert order == ["ours", "torch"] * 5  # one of them to warm up
    assert [len(times) for times in seconds.values()] == [4, 4]


@pytest.mark.skipif(not clinattn.backends()["cpu"], reason="the compiled backend is not built here")
class TestMeasured:
    @pytest.mark.parametrize(
        "case",
        [
            {"lengths": (40,), "is_causal": True},
            {"lengths": (40,), "window": 5},
            {"lengths": (33, 7, 12)},
            {"lengths": (40,), "kv_heads": 1},
        ],
        ids=str,
    )
    def test_a_row_for_each_pass_and_way(self, program, problem, cases, case):
        ways = {"dense": problem.OursDense, "packed": problem.OursPacked}
        case = problem.AttentionCase(heads=2, head_dim=16, **case)
        entry = cases.Entry("small", case, {"bf16": (1.0, None)}, ways)
        found = list(program.measure(entry, "bf16", ["forward", "backward"], 2, FACTS))
        assert [(row.case, row.passes) for row in found] == [
            (f"small {way}", passes) for passes in ("forward", "backward") for way in ways
        ]
        assert all(len(row.ours_s) == len(row.torch_s) == 2 for row in found)
        assert all(row.ours_ms > 0 and row.ours_of_peak > 0 for row in found)

    def test_a_wrong_result_is_not_timed(self, program, problem, cases):
        class Wrong(problem.OursDense):
            def forward(self):
                return super().forward() * 1.01

        case = problem.AttentionCase((20,), 1, 8)
        entry = cases.Entry("wrong", case, {"fp32": None}, {"": Wrong})
        with pytest.raises(AssertionError):
            next(program.measure(entry, "fp32", ["forward"], 1, FACTS))

    def test_the_peak_is_that_of_the_kernels_in_force(self, threads):
        module = importlib.import_module("clinattn._C")
        threads(1)
        before = module.instruction_set()
        peak = {name: module.peak_flops(name) for name in ("float32", "bfloat16", "float16")}
        assert module.instruction_set() == before
        assert all(flops > 1e8 for flops in peak.values())
        if before == "avx512_bf16":
            assert peak["bfloat16"] > 1.5 * peak["float32"]
        if before == "amx":
            assert peak["bfloat16"] > 2 * peak["float16"] > 3 * peak["float32"]

    def test_the_peak_of_an_unknown_dtype(self):
        module = importlib.import_module("clinattn._C")
        with pytest.raises(ValueError, match="'int8'; expected float32"):
            module.peak_flops("int8")
