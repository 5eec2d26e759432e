"""Stages of run.py about what the host does: calls captured in CUDA graphs, and no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from gpu.rows import Run, outcome
from gpu.training import TrainingCall, calls_of_stage

Function = Callable[[], list[Tensor]]


def graph_capture(run: Run) -> None:
    """After one warm-up call a CUDA graph takes forward and backward, and replays them on new data.

    In the dry run a replay is another call.
    """
    for backend in run.backends:
        problems = [calls_of_stage(backend, run.device, run.dryrun, seed) for seed in (0, 1)]
        for call, fresh in zip(*problems, strict=True):
            kept = [x.clone() for x in call.qkvd]
            for way, function in (("forward", call.forward), ("both passes", call.both)):
                result = outcome(lambda: check_replay(call, function, fresh.qkvd))  # noqa: B023
                run.row(backend=backend, case=f"{call.name}, {way}", **result)
                fill(call.qkvd, kept)


def check_replay(call: TrainingCall, function: Function, fresh: list[Tensor]) -> None:
    """Checks that replays of a captured call give what the call gives, on data set after capture.

    Under dropout each replay draws a seed: other pairs every time, the same after manual_seed.
    """
    replay = captured(function, call.qkvd[0].device)
    fill(call.qkvd, fresh)
    drops = "dropout_p" in call.keywords
    replayed = results(replay, 2 if drops else 1)
    same_bits(replayed, results(function, len(replayed)))
    if drops:
        assert not torch.equal(replayed[0][0], replayed[1][0]), "both replays drop the same pairs"
        same_bits(results(replay, 2), replayed)


def results(function: Function, calls: int) -> list[list[Tensor]]:
    """Results of calls after one manual_seed: a replay writes where the one before it did."""
    torch.manual_seed(0)
    return [[x.clone() for x in function()] for _ in range(calls)]


def same_bits(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for x, y in zip(chain(*actual), chain(*expected), strict=True):
        assert torch.equal(x, y), f"{(x != y).sum()} values differ"


def fill(static: list[Tensor], values: list[Tensor]) -> None:
    for x, y in zip(static, values, strict=True):
        x.copy_(y)


def captured(function: Function, device: torch.device) -> Function:
    """Returns a replay of function(), captured after one call of function() on a side stream."""
    if device.type != "cuda":
        function()
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


def no_host_sync(run: Run) -> None:
    """Checks that neither pass waits for the device; torch raises where an operation would."""
    for backend in run.backends:
        for call in calls_of_stage(backend, run.device, run.dryrun):
            call.both()

            def check(call: TrainingCall = call) -> None:
                with synchronization_forbidden(run.device):
                    call.both()

            run.row(backend=backend, case=call.name, **outcome(check))


@contextmanager
def synchronization_forbidden(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
