"""bench/gpu/candidates.py, walked through in Triton's interpreter."""

import sys
import warnings

import pytest
import torch
from places import BENCH

sys.path.append(str(BENCH))

from clinattn.kernels import backward  # noqa: E402
from gpu import candidates  # noqa: E402

CPU = torch.device("cpu")
TILE = (32, 16, 4, 1)


class Run:
    device, dryrun, backends = CPU, True, ["triton"]

    def __init__(self):
        self.rows = []

    def row(self, **fields):
        self.rows.append(fields)

    def enough_time(self, seconds, what):
        return True


@pytest.fixture(autouse=True)
def no_arithmetic_warnings():
    """numpy warns of inf - inf in lanes that a tl.where then discards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.mark.parametrize("mask", ["causal", "float keys"])
def test_halves_of_the_backward_pass_are_its_gradients(mask):
    for table in ("dq", "dkdv"):
        problem = candidates.KernelInputs(table, 16, mask, 2, 40, CPU)
        problem.prepare()
        dq, dk, dv, *_ = backward.attention_backward(
            problem.do, None, *problem.outputs, problem.call
        )
        expected = (dq,) if table == "dq" else (dk, dv)
        for _ in range(2):
            assert all(map(torch.equal, problem.run(), expected))
        assert candidates.distance(candidates.with_tile(problem, TILE), expected) < 1e-2


def test_what_fails_or_is_wrong_is_out():
    run, right = Run(), (torch.ones(3), torch.zeros(3))

    def fails():
        raise RuntimeError("out of resource: shared memory")

    functions = {
        "shipped": lambda: right,
        "right": lambda: right,
        "wrong": lambda: (right[0] * 1.1, right[1]),
        "nan": lambda: (right[0] * torch.nan, right[1]),
        "fails": fails,
        "output alone": lambda: right[:1],
    }
    kept = candidates.agreeing(functions, run, {"dim": 16})
    assert list(kept) == ["shipped", "right", "output alone"]
    assert [row["entrant"] for row in run.rows] == ["wrong", "nan", "fails"]
    assert not any("ok" in row for row in run.rows)
    assert candidates.agreeing({"shipped": fails}, run, {}) == {}
    assert run.rows[-1]["ok"] is False


def test_the_verdict_names_the_best_tile():
    contest = candidates.DRY_CONTESTS[1]
    shipped = candidates.shipped_tile(contest, (9, 0))
    run = Run()
    candidates.verdict(contest, {str(shipped): 2.0, str(TILE): 1.0}, {}, run)
    candidates.verdict(contest, {str(shipped): 2.0}, {}, run)
    candidates.verdict(contest, {str(TILE): 1.0}, {}, run)
    best, alone, none = run.rows
    assert (best["best"], best["shipped"], best["times_as_fast"]) == (TILE, shipped, 2.0)
    assert alone["best"] == shipped and alone["times_as_fast"] == 1.0
    assert "skipped" in none


def test_every_entrant_has_a_row():
    run = Run()
    candidates.candidates(run)
    out = [row for row in run.rows if row.keys() & {"dropped", "failed", "wrong", "skipped"}]
    assert {row["entrant"] for row in out} == {"sdpa-cudnn"}, out
    timed = {(x["table"], x["mask"], x["entrant"]) for x in run.rows if "ms" in x}
    for contest in candidates.DRY_CONTESTS:
        for mask in contest.masks:
            tiles = (candidates.shipped_tile(contest, (9, 0)), *contest.tiles)
            assert {(contest.table, mask, str(tile)) for tile in tiles} <= timed
    assert sum("best" in row for row in run.rows) == len(candidates.DRY_CONTESTS)
    assert not [row for row in run.rows if row.get("ok") is False]
