"""The tiles of bench/gpu/candidates.py compile without spills (its run: triton/interpreted)."""

import importlib
import os

import pytest
import torch
from places import BENCH

pytest.importorskip("triton")

from clinattn.tools.compiled.kernel_report import CARDS, kernel_reports  # noqa: E402


@pytest.mark.skipif(
    os.environ.get("CLINATTN_TESTS") != "every", reason="compiles for minutes"
)
@pytest.mark.parametrize("at", range(7))
def test_tiles_fit(at, monkeypatch):
    """A tile that spills on Hopper would not be shipped if it won."""
    monkeypatch.syspath_prepend(BENCH)
    candidates = importlib.import_module("gpu.candidates")
    assert len(candidates.CONTESTS) == 7
    contest = candidates.CONTESTS[at]
    for mask in contest.masks:
        cpu = torch.device("cpu")
        problem = candidates.KernelInputs(contest.table, contest.dim, mask, 2, 256, cpu)
        problem.o, problem.lse = problem.call.q, torch.zeros(problem.call.q.shape[:3])
        problem.sums = [problem.lse, problem.lse]
        for tile in contest.tiles:
            (report,) = kernel_reports(lambda t=tile, p=problem: candidates.with_tile(p, t), 90)
            assert not report.local and not report.serialized, (mask, tile)
            assert report.shared <= CARDS[90].block_shared, (mask, tile)
