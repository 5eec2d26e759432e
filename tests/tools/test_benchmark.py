"""The benchmark end to end on a workload of a second or two, and its parts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pages import assert_self_contained

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")

from patients import write_events, write_splits  # noqa: E402

from clinattn.encoder import EncoderConfig, MaskedLanguageModel  # noqa: E402
from clinattn.encoder.heads import IGNORE  # noqa: E402
from clinattn.tools.benchmark.agreement import Disagreement, errors  # noqa: E402
from clinattn.tools.benchmark.measure import peak_memory, quartiles  # noqa: E402
from clinattn.tools.benchmark.run import (  # noqa: E402
    Benchmark,
    descending,
    encoder_config,
    open_workload,
)
from clinattn.tools.benchmark.settings import BenchmarkSettings  # noqa: E402
from clinattn.tools.benchmark.variants import VARIANTS, Runner  # noqa: E402
from clinattn.tools.benchmark.workload import (  # noqa: E402
    MASKED_SHARE,
    profile_workload,
    shortened,
)
from clinattn.tools.report.page import ReportError, load_result, render  # noqa: E402
from clinattn.tools.report.plots import write_plots  # noqa: E402
from clinattn.training.masking import MASKED, mask_tokens  # noqa: E402
from clinattn.workloads.seeds import derived_seed  # noqa: E402
from clinattn.workloads.vocabulary import CLS, MASK  # noqa: E402

SMALL = BenchmarkSettings(
    profile="ehr_population", max_tokens=96, sequences=6, batch_size=3, rounds=2
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def result():
    stages: list[str] = []
    result = Benchmark(SMALL, lambda message, done, total: stages.append(message)).run()
    assert stages[0] == "reading sequences" and stages[-1] == "done"
    return json.loads(json.dumps(result))  # what a file would hold


def test_rows_hold_the_measurement_and_what_it_depends_on(result):
    assert [(row["mode"], row["variant"]) for row in result["rows"]] == [
        (mode, variant.name) for mode in ("train", "infer") for variant in VARIANTS
    ]
    for row in result["rows"]:
        rate = row["tokens_per_s"]
        assert 0 < rate["q1"] <= rate["median"] <= rate["q3"]
        assert row["rounds"] == 2 and len(row["seconds"]) == 2
        assert rate["median"] == pytest.approx(
            np.median([row["real_tokens"] / s for s in row["seconds"]]), rel=1e-3
        )
        assert {"date", "commit", "cpu", "threads", "torch", "clinattn", "dtype"} <= row.keys()
    assert not result["interrupted"]


def test_padding_is_computed_and_never_counted(result):
    by_name = {row["variant"]: row for row in result["rows"] if row["mode"] == "train"}
    assert len({row["real_tokens"] for row in by_name.values()}) == 1
    assert by_name["clinattn_packed"]["padding_share"] == 0
    padded = by_name["sdpa_padded"]["padding_share"]
    assert by_name["sdpa_bucketed"]["padding_share"] < padded
    assert by_name["clinattn_padded"]["padding_share"] == padded > 0.1


def test_speedups_are_ratios_of_medians(result):
    rate = {(row["mode"], row["variant"]): row["tokens_per_s"]["median"] for row in result["rows"]}
    assert len(result["speedups"]) == 4
    for speedup in result["speedups"]:
        mode, over = speedup["mode"], speedup["over"]
        assert speedup["ratio"] == rate[mode, "clinattn_packed"] / rate[mode, over]


def test_memory_is_measured(result):
    assert all(row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= 0
               for row in result["rows"])  # fmt: skip


@pytest.mark.skipif(
    peak_memory(lambda: None, torch.device("cpu")) is None,
    reason="/proc/self/clear_refs of Linux, or glibc, is missing",
)
def test_peak_memory_is_what_the_work_took():
    size = 64 << 20
    measured = peak_memory(lambda: torch.ones(size // 4), torch.device("cpu"))
    assert size * 0.9 < measured < size * 1.5


def test_agreement_is_recorded_with_its_bounds(result):
    errors = result["agreement"]["errors"]
    allowed = errors["allowed"]
    for variant in BY_NAME:
        assert all(errors[variant][name] <= allowed[name] for name in allowed)
    assert 0 < allowed["hidden"] < 1e-4


@pytest.mark.parametrize("fault", ["hidden", "gradients"])
def test_a_wrong_variant_is_never_timed(monkeypatch, fault):
    honest = Runner.loss if fault == "gradients" else Runner.infer

    def wrong(self, variant, examples):
        right = honest(self, variant, examples)
        if not variant.packed:
            return right
        if fault == "hidden":
            return [states + 1e-3 for states in right]
        return right[0] * 1.001, right[1]

    monkeypatch.setattr(Runner, "loss" if fault == "gradients" else "infer", wrong)
    runs: list[str] = []
    monkeypatch.setattr(Runner, "run", lambda self, *args: runs.append("timed"))
    with pytest.raises(Disagreement, match="clinattn_packed: .* nothing was timed"):
        Benchmark(SMALL).run()
    assert not runs


def test_ctrl_c_keeps_what_was_measured(monkeypatch):
    def interrupt(message, done, total):
        if message.startswith("round 2: infer"):
            raise KeyboardInterrupt

    result = Benchmark(SMALL, interrupt).run()
    assert result["interrupted"] and len(result["rows"]) == 8
    assert {row["rounds"] for row in result["rows"]} == {1, 2}
    assert "interrupted" in render(json.loads(json.dumps(result)))


def test_what_does_not_fit_costs_one_way(monkeypatch):
    honest = Runner.run

    def run(self, mode, variant, examples):
        if variant.name == "sdpa_padded":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")
        honest(self, mode, variant, examples)

    monkeypatch.setattr(Runner, "run", run)
    result = json.loads(json.dumps(Benchmark(replace(SMALL, modes=("infer",))).run()))
    left = [variant.name for variant in VARIANTS if variant.name != "sdpa_padded"]
    assert [row["variant"] for row in result["rows"]] == left
    assert [speedup["over"] for speedup in result["speedups"]] == ["sdpa_bucketed"]
    (failed,) = result["out_of_memory"]
    assert failed["mode"] == "infer" and failed["label"] == "torch SDPA, padded"
    assert "torch SDPA, length-bucketed" in render(result)


@pytest.mark.parametrize("stage", ["reading", "checking", "calibrating", "memory"])
def test_ctrl_c_before_any_round_still_gives_a_result(stage):
    def interrupt(message, done, total):
        if message.startswith(stage):
            raise KeyboardInterrupt

    result = json.loads(json.dumps(Benchmark(SMALL, interrupt).run()))
    assert result["interrupted"] and result["rows"] == []
    assert "interrupted" in render(result)


def test_the_budget_decides_how_much_is_run():
    settings = BenchmarkSettings(
        profile="note_chunks", max_tokens=128, modes=("infer",), budget_s=5.0
    )
    result = Benchmark(settings).run()
    assert {row["mode"] for row in result["rows"]} == {"infer"}
    assert 4 <= result["workload"]["sequences"] < 2000


def test_the_deadline_ends_a_round_and_what_was_measured_is_the_result():
    def progress(message, done, total):
        if message == "round 1: infer, clinattn, padded":
            benchmark.runner.until = -math.inf

    lines: list[str] = []
    benchmark = Benchmark(replace(SMALL, modes=("infer",)), progress, lines.append)
    result = json.loads(json.dumps(benchmark.run()))
    assert result["time_over"] and not result["interrupted"]
    assert [row["variant"] for row in result["rows"]] == ["sdpa_padded", "sdpa_bucketed"]
    assert [line.rpartition(":")[0] for line in lines] == [
        "round 1: infer, torch SDPA, padded",
        "round 1: infer, torch SDPA, length-bucketed",
    ]
    assert "The time was over" in render(result)


@pytest.mark.parametrize("stage", ["reading", "checking", "calibrating", "memory", "round 1"])
def test_no_stage_begins_after_the_deadline(stage):
    begun: list[str] = []

    def progress(message, done, total):
        begun.append(message)
        if message.startswith(stage):
            benchmark.until = -math.inf
            if stage != "reading":
                benchmark.runner.until = -math.inf

    benchmark = Benchmark(replace(SMALL, modes=("infer",)), progress)
    result = json.loads(json.dumps(benchmark.run()))
    assert result["time_over"] and result["rows"] == [] and begun[-1].startswith(stage)
    assert "The time was over" in render(result)


def test_a_row_says_how_much_of_the_cpus_it_had(result):
    for row in result["rows"]:
        assert len(row["process_seconds"]) == row["rounds"]
        share = sum(row["process_seconds"]) / sum(row["seconds"])
        share /= min(row["threads"], row["cpus"])
        assert row["cpu_share"] == pytest.approx(share, rel=1e-3)
        assert {"other_cpus", "noted_from", "disturbed"} <= row.keys()


def test_the_page_says_what_ran_beside_a_row(result):
    changed = json.loads(json.dumps(result))
    for row in changed["rows"]:
        row |= {"cpu_share": 0.66, "other_cpus": 0.0, "noted_from": 1 / 3, "disturbed": False}
    assert "other work kept" not in render(changed) and "66%*" not in render(changed)
    changed["rows"][1] |= {"other_cpus": 0.876, "disturbed": True, "cpus": 2}
    html = render(changed)
    assert html.count("66%*") == 1 and "other work kept up to 0.88 of the 2 CPUs" in html
    assert "noted from 0.33 CPUs on" in html
    for row in changed["rows"]:  # of a version that did not know it
        del row["cpu_share"], row["disturbed"]
    assert "not available" in render(changed)


def test_learned_positions_grow_with_the_sequences():
    settings = BenchmarkSettings(
        profile="fixed", preset="tiny", max_tokens=80, sequences=2, rounds=1, modes=("infer",)
    )
    rows = Benchmark(settings).run()["rows"]
    assert all(row["padding_share"] == 0 for row in rows)


def test_lengths_stay_aggregate(result):
    """No single length or token of a patient is written."""
    text = json.dumps(result)
    assert len(result["workload"]["histogram"]["counts"]) == 24
    assert sum(result["workload"]["histogram"]["counts"]) == result["workload"]["available"]
    assert "token_ids" not in text and "subject" not in text


def test_report_is_self_contained(result):
    html = render(result)
    assert_self_contained(html)
    assert html.count("<svg") == 6 and "prefers-color-scheme: dark" in html
    for row in result["rows"]:
        assert f"{row['tokens_per_s']['median']:,.0f}" in html


def test_report_escapes_what_it_shows(result):
    changed = json.loads(json.dumps(result))
    changed["workload"]["source"] = "<script>alert(1)</script>"
    assert "<script>" not in render(changed)


def test_bad_results_files_are_named(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ReportError, match="results='.*results.json' cannot be read"):
        load_result(path)
    path.write_text("{")
    with pytest.raises(ReportError, match="cannot be read"):
        load_result(path)
    path.write_text("[]")
    with pytest.raises(ReportError, match="is no benchmark result: expected a JSON object"):
        load_result(path)


def test_plots_are_written_twice_and_the_same(result, tmp_path):
    names = sorted(path.name for path in write_plots(result, tmp_path))
    memory = {"memory.png", "memory.svg"} if result["rows"][0]["peak_memory_bytes"] else set()
    assert set(names) == memory | {
        f"{plot}.{kind}" for plot in ("throughput", "padding", "lengths") for kind in ("png", "svg")
    }
    first = (tmp_path / "throughput.svg").read_bytes()
    write_plots(result, tmp_path)
    assert (tmp_path / "throughput.svg").read_bytes() == first


def test_every_variant_sees_the_same_real_tokens():
    lengths = [5, 9, 2, 7, 9]
    for variant in VARIANTS:
        batches = variant.batches(lengths, 2)
        assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert BY_NAME["sdpa_padded"].batches(lengths, 2) == BY_NAME["clinattn_packed"].batches(
        lengths, 2
    )
    assert BY_NAME["sdpa_bucketed"].batches(lengths, 2) == [[2, 0], [3, 1], [4]]
    assert BY_NAME["sdpa_padded"].computed_tokens(lengths, [0, 1]) == 2 * 16  # a multiple of 8
    assert BY_NAME["clinattn_packed"].computed_tokens(lengths, [0, 1]) == 14


def test_padded_rows_fill_up_to_a_multiple_of_eight():
    rows = [torch.arange(n) for n in (5, 9, 2)]
    ids = BY_NAME["sdpa_padded"].collate(rows, 77, torch.device("cpu"))
    assert ids.shape == (3, 16)
    assert all(torch.equal(x[: len(row)], row) for x, row in zip(ids, rows, strict=True))
    assert all((x[len(row) :] == 77).all() for x, row in zip(ids, rows, strict=True))
    settings = BenchmarkSettings(preset="clinicalbert", max_tokens=515)
    assert encoder_config(settings).max_positions == 520


def test_a_nan_is_the_largest_error():
    truth = dict.fromkeys(("hidden", "gradient of a", "gradient of b"), torch.ones(2))
    wrong = {name: x.clone() for name, x in truth.items()}
    wrong["gradient of a"][0] = torch.nan
    found = errors(wrong, truth)
    assert found["hidden"] == 0 and np.isnan(found["gradients"])


def test_training_is_work_that_changes_nothing():
    workload = profile_workload("fixed", 16, 50, seed=0)
    model = MaskedLanguageModel(EncoderConfig.preset("tiny", vocab_size=50))
    before = [p.clone() for p in model.parameters()]
    runner = Runner(model, torch.device("cpu"))
    runner.run("train", VARIANTS[3], [workload.example(0, 0)])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_examples_mask_a_share_and_never_cls():
    workload = profile_workload("fixed", 4096, 50, seed=0)
    example = workload.example(0, seed=1)
    masked = example.labels != IGNORE
    assert masked.float().mean() == pytest.approx(MASKED_SHARE, abs=0.03)
    assert example.ids[0] == example.masked_ids[0] == CLS
    hidden = (example.masked_ids[masked] == MASK).float().mean()
    assert hidden == pytest.approx(MASKED, abs=0.03)  # as in training: others stay or are replaced
    ordinary = torch.from_numpy(workload.source.vocabulary.ordinary())
    drawn = derived_seed("mask", 1, 0, 0)
    seen, labels = mask_tokens(example.ids, MASKED_SHARE, MASK, ordinary, drawn)
    assert torch.equal(seen, example.masked_ids) and torch.equal(labels, example.labels)
    assert torch.equal(example.labels[masked], example.ids[masked])
    assert torch.equal(example.labels, workload.example(0, seed=1).labels)


def test_a_sample_keeps_the_distribution():
    workload = profile_workload("note_discharge", 4096, 50, seed=0)
    lengths = workload.lengths[workload.sample(40, seed=0)]
    assert np.median(lengths) == pytest.approx(np.median(workload.lengths), rel=0.03)
    assert lengths.mean() == pytest.approx(workload.lengths.mean(), rel=0.03)
    assert sorted(workload.sample(2000, seed=0)) == list(range(2000))


def test_the_split_train_is_run_where_the_owner_lists_splits(tmp_path):
    of = {p: "held_out" if p % 4 == 0 else "train" for p in range(1, 41)}
    write_splits(write_events(tmp_path, [(p, i, f"OF//{p % 4}") for p in of for i in range(3)]), of)
    settings = BenchmarkSettings(data=f"meds:{tmp_path}")
    sizes = {}
    for split in (None, "train", "held_out", "all"):
        source = open_workload(replace(settings, split=split)).source
        sizes[split] = len(source), len(source.vocabulary) - 5
        assert (f"split {split or 'train'}" in source.title) == (split != "all")
    assert sizes == {None: (30, 3), "train": (30, 3), "held_out": (10, 1), "all": (40, 4)}
    with pytest.raises(ValueError, match=r"split='dev': .* has \['held_out', 'train'\], expected"):
        open_workload(replace(settings, split="dev"))
    with pytest.raises(ValueError, match="split='train': profile=.* has no list of splits"):
        open_workload(replace(SMALL, split="train"))
    open_workload(replace(SMALL, split="all"))


def test_small_parts():
    assert quartiles([1.0, 2.0, 3.0]) == {"median": 2.0, "q1": 1.5, "q3": 2.5}
    counts = descending(80, 4)
    assert counts[0] == 80 and counts[-1] == 4 and counts == sorted(set(counts), reverse=True)
    workload = profile_workload("note_discharge", 1000, 50, seed=0)
    cut = shortened([workload.example(i, 0) for i in range(3)], 100)
    assert max(len(e.ids) for e in cut) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": ("tune",)}, r"modes=\('tune',\): expected some of \('train', 'infer'\)"),
        ({"modes": ()}, r"modes=\(\)"),
        ({"dtype": "int8"}, "dtype='int8': expected one of"),
        ({"max_tokens": 1}, "max_tokens=1: expected at least 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"budget_s": 0.0}, "budget_s=0.0: expected more than 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**change)
