"""The benchmark of training by number of processes: the paper, and rows that were measured."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
from places import BENCH

from clinattn.workloads.opening import parse_data

ROWS = sorted((BENCH / "results").glob("scaling-*.json"))


@pytest.fixture(scope="module")
def paper(bench_on_the_path):
    return importlib.import_module("scaling.paper")


@pytest.fixture(scope="module")
def job(paper):
    return paper.Job(weights=1e6, flops=6e6, tokens=8000, batch=1000)


@pytest.fixture(scope="module")
def plain(paper):
    return paper.Machine(
        rate=6e9, within=1e9, between=1e8, node=4, latency=1e-4, overlap=0.0, memory=float("inf")
    )


def test_a_process_sends_two_copies_less_the_shares_it_has(paper, plain):
    still = replace(plain, latency=0.0)
    assert paper.summed(4e6, still, 1) == 0
    assert paper.summed(4e6, still, 2) == pytest.approx(4e-3)
    assert paper.summed(4e6, still, 4) == pytest.approx(6e-3)
    assert paper.summed(4e6, still, 8) == pytest.approx(7e-2)  # between nodes


def test_each_bucket_has_its_messages(paper, plain):
    still, total = replace(plain, latency=0.0), 3 * paper.BUCKET
    ring = paper.summed(total, plain, 4) - paper.summed(total, still, 4)
    assert ring == pytest.approx(3 * 6e-4)
    tree = replace(plain, tree=True)
    assert paper.summed(1, plain, 512) == pytest.approx(1022e-4, rel=1e-3)
    assert paper.summed(1, tree, 512) == pytest.approx(18e-4, rel=1e-3)


def test_a_step_computes_and_sends(paper, job, plain):
    one, four = paper.step(job, plain, 1), paper.step(job, plain, 4)
    assert one.seconds == pytest.approx(8.0) and four.compute == pytest.approx(2.0)
    assert four.exposed == four.messages == pytest.approx(6e-3 + 6e-4)
    shared = paper.step(job, replace(plain, processors=2), 4)
    assert shared.compute == pytest.approx(4.0)


def test_the_backward_pass_of_the_last_batch_hides_all_but_the_last_bucket(paper, job, plain):
    large = replace(job, weights=2 * paper.BUCKET)  # eight buckets
    hidden = paper.step(large, replace(plain, overlap=1.0, rate=1e8), 2)
    assert hidden.exposed == paper.summed(paper.BUCKET, plain, 2) < hidden.messages
    seen = paper.step(large, replace(plain, overlap=1.0, rate=6e10), 2)
    hiding = 2 / 3 * seen.compute * job.batch / (job.tokens / 2)
    assert seen.exposed == pytest.approx(seen.messages - hiding)


def test_it_bends_where_messages_take_a_tenth(paper, job, plain):
    assert paper.efficiency(job, plain, 1) == 1.0
    shares = [paper.efficiency(job, paper.H100, p) for p in (8, 16, 64, 512)]
    assert shares == sorted(shares, reverse=True)
    most = paper.bend(job, plain)
    alone = paper.step(job, plain, 1).seconds
    reached = [alone / (p * paper.step(job, plain, p).seconds) for p in (most, 2 * most)]
    assert reached[0] >= 0.9 > reached[1]


def test_defaults_are_data_that_exist_and_results_have_no_path(bench_on_the_path, monkeypatch):
    run = importlib.import_module("scaling.run")
    monkeypatch.setattr("sys.argv", ["run.py"])
    assert run.shareable(run.arguments().data) == "profile:ehr_population"
    assert parse_data(run.arguments().data).kind == "profile"
    assert run.shareable("meds:/ward/of/ours") == "meds"


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_paper_holds_what_was_measured(path):
    """On the CPU: what is predicted from one process and from sums alone, within a quarter."""
    content = json.loads(path.read_text())
    assert {"environment", "settings", "rows"} <= content.keys()
    held = [row for row in content["rows"] if row["batches"] == "balanced"]
    assert {row["processes"] for row in held} >= {1, 2, 4}
    for row in held:
        ratio = row["tokens_per_s"]["median"] / row["predicted_tokens_per_s"]
        assert 0.75 < ratio < 1.25, (row["processes"], ratio)
