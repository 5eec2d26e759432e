"""Ranges of a profile: their names and nesting, and that there are none unless asked for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from clinattn import fused_attention
from clinattn.encoder import Encoder, EncoderConfig
from clinattn.operator import ranges
from clinattn.tools import profiling

LAYERS = 3
LENGTHS = torch.tensor([7, 13])


@pytest.fixture
def encoder():
    return Encoder(EncoderConfig.preset("tiny", vocab_size=50, num_layers=LAYERS, windows=()))


@pytest.fixture
def ids():
    return torch.randint(50, (2, 13))


class Recorder:
    """Stands in for NVTX's stack of ranges; records what opened and closed, in order."""

    def __init__(self):
        self.events: list[str] = []
        self.stack: list[str] = []

    @contextmanager
    def __call__(self, name: str):
        name = name.removeprefix(ranges.PREFIX).split(",")[0]
        self.events.append(name)
        self.stack.append(name)
        yield
        assert self.stack.pop() == name
        self.events.append(f"end of {name}")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(ranges, "record_function", recorder)
    return recorder


def around(outer: str, inner: str) -> list[str]:
    return [outer, inner, f"end of {inner}", f"end of {outer}"]


def expected(passes: str, layers: list[int]) -> list[str]:
    return [x for i in layers for x in around(f"layer {i} {passes}", f"attention {passes}")]


UPWARD, DOWNWARD = list(range(LAYERS)), list(reversed(range(LAYERS)))


def test_no_range_unless_asked_for(encoder, ids, monkeypatch):
    def never(*args):
        raise AssertionError("a range was made")

    for name in ("run", "run_layer", "_open"):
        monkeypatch.setattr(ranges, name, never)
    encoder(ids, lengths=LENGTHS).sum().backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen-embeddings"])
def test_each_pass_of_each_layer_holds_its_attention(encoder, ids, recorder, frozen):
    encoder.embeddings.requires_grad_(not frozen)
    with ranges.recording(nvtx=False):
        out = encoder(ids, lengths=LENGTHS)
        assert recorder.events == expected("forward", UPWARD)
        recorder.events.clear()
        out.sum().backward()
    assert recorder.events == expected("backward", DOWNWARD)
    assert not recorder.stack


def test_a_backward_pass_that_stops_early_ends_its_range(encoder, ids, recorder):
    with ranges.recording(nvtx=False):
        out = encoder(ids, lengths=LENGTHS)
        recorder.events.clear()
        last = encoder.layers[-1].feed_forward.down.weight
        for _ in range(2):
            torch.autograd.grad(out.sum(), last, retain_graph=True)
    assert recorder.events == ["layer 2 backward", "end of layer 2 backward"] * 2


def test_inference_has_forward_ranges_alone(encoder, ids, recorder):
    with ranges.recording(nvtx=False), torch.inference_mode():
        encoder(ids, lengths=LENGTHS)
    assert recorder.events == expected("forward", UPWARD)


def test_results_are_those_without_ranges(encoder, ids):
    found = []
    for on in (False, True):
        encoder.zero_grad()
        if on:
            with ranges.recording(nvtx=False):
                out = encoder(ids, lengths=LENGTHS)
                out.square().sum().backward()
        else:
            out = encoder(ids, lengths=LENGTHS)
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in encoder.parameters())])
    for without, with_ranges in zip(*found, strict=True):
        assert torch.equal(without, with_ranges)


@pytest.mark.unpoisoned
def test_compiled_attention_keeps_its_ranges(encoder, ids, recorder):
    compiled = torch.compile(encoder, backend="aot_eager")
    with ranges.recording(nvtx=False):
        compiled(ids, lengths=LENGTHS).sum().backward()
    for passes in ("forward", "backward"):
        assert recorder.events.count(f"attention {passes}") == LAYERS


def test_ranges_name_the_backend(monkeypatch):
    names = []

    @contextmanager
    def opened(name):
        names.append(name)
        yield

    monkeypatch.setattr(ranges, "record_function", opened)
    q = torch.randn(1, 1, 3, 8, requires_grad=True)
    with ranges.recording(nvtx=False):
        fused_attention(q, q, q, backend="reference").sum().backward()
    assert names == [f"clinattn attention {p}, reference" for p in ("forward", "backward")]


def test_ranges_are_off_again_after_an_error():
    with pytest.raises(KeyError), ranges.recording(nvtx=False):
        assert ranges.on
        raise KeyError
    assert not ranges.on


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nvtx_without_a_gpu_is_refused():
    with pytest.raises(RuntimeError, match="expected a CUDA device"), ranges.recording(nvtx=True):
        pass
    assert not ranges.on


@pytest.mark.parametrize("fails", [False, True], ids=["steps", "a-step-that-fails"])
def test_the_window_of_nsys_holds_the_steps(monkeypatch, fails):
    events: list[str] = []

    @contextmanager
    def opened(name):
        events.append(name)
        yield

    def step():
        events.append("work")
        if fails:
            raise KeyError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", opened)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("stop"))
    if fails:
        with pytest.raises(KeyError):
            profiling.run_for_nsys(step, 2)
        assert events == ["synchronize", "start", "clinattn step", "work", "stop"]
    else:
        profiling.run_for_nsys(step, 2)
        steps = ["clinattn step", "work"] * 2
        assert events == ["synchronize", "start", *steps, "synchronize", "stop"]


def test_the_lines_for_nsys_run_the_same_command(tmp_path):
    record, summary = profiling.nsys_lines(["profile", "--mode", "a b"], tmp_path / "out put")
    assert "-c cudaProfilerApi --capture-range-end=stop" in record
    assert record.endswith("python -m clinattn profile --mode 'a b'")
    assert f"-o '{tmp_path}/out put'" in record
    assert summary.startswith("nsys stats -r ") and summary.endswith(" put.nsys-rep'")
