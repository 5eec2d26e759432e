"""torch.compile around models in training: one graph for all lengths, numbers as exact as eager."""

import copy
from dataclasses import replace

import pytest
import torch
from encoders import BERT, MODERN, seeded
from support import assert_close
from torch import nn
from torch._dynamo.utils import counters

from clinattn import FusedAttention, fused_attention
from clinattn.encoder import Encoder

# Compilers allocate through torch.empty themselves.
pytestmark = pytest.mark.unpoisoned

CONFIGS = {"modernbert": MODERN, "bert": BERT}


class SelfAttention(nn.Module):
    """Self-attention as users write it by hand, with key lengths, timestamps and dropout."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.decay = nn.Parameter(torch.rand(3))
        self.slopes = nn.Parameter(torch.rand(3))

    def forward(self, x, lengths, times):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).transpose(1, 3).unbind(2)
        o = fused_attention(
            q, k, v, kv_lengths=lengths, q_lengths=lengths, times=times, time_decay=self.decay,
            alibi_slopes=self.slopes, softcap=9.0, dropout_p=0.1 * self.training,
        )  # fmt: skip
        return x + self.out(o.transpose(1, 2).flatten(2))


class TwoLayers(nn.Module):
    def __init__(self, autocast=False):
        super().__init__()
        self.layers = nn.ModuleList([SelfAttention(), SelfAttention()])
        self.autocast = autocast

    def forward(self, x, lengths, times):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            for layer in self.layers:
                x = layer(x, lengths, times)
        return x


@pytest.fixture
def inductor():
    """torch.compile by default: one graph or an error, with eager's random numbers."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"torch.compile finds no C++ compiler: {error}")
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(fallback_random=True):
        yield lambda model, **options: torch.compile(model, fullgraph=True, **options)
    torch._dynamo.reset()


def trained(call, model, weight, *args, **kwargs):
    """Returns the output of a call and the gradients of all parameters, weighted by `weight`."""
    torch.manual_seed(1)
    out = call(*args, **kwargs)
    out = torch.where(weight == 0, 0, out)  # padding means nothing, and may hold anything
    return [out, *torch.autograd.grad((out * weight).sum(), list(model.parameters()))]


def compare(compiled, model, *args, weight, **kwargs):
    """Compiled as close to fp64 as eager is, with what dropout draws in eager."""
    exact = copy.deepcopy(model).double()
    exact.autocast = False
    doubled = [x.double() if x.is_floating_point() else x for x in args]
    actual = trained(compiled, model, weight, *args, **kwargs)
    eager = trained(model, model, weight, *args, **kwargs)
    truths = trained(exact, exact, weight.double(), *doubled, **kwargs)
    for i, (a, b, truth) in enumerate(zip(actual, eager, truths, strict=True)):
        assert a.dtype == b.dtype
        assert_close(str(i), a, truth, b)


def weights(lengths, *shape):
    """Random, and 0 in the padding."""
    real = torch.arange(shape[1]) < lengths[:, None]
    return torch.randn(shape) * real[..., None]


@pytest.mark.parametrize(
    "autocast, mode",
    [(True, None), (False, "reduce-overhead")],
    ids=["autocast", "reduce-overhead"],
)
def test_modules_compile_to_one_graph_for_every_length(autocast, mode, inductor):
    """Static modules, a length marked as dynamic; dropout draws what it draws in eager.

    reduce-overhead is for GPUs, and harmless on a CPU.
    """
    model = TwoLayers(autocast)
    compiled = inductor(model, mode=mode)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (33, 65, 17):
            x, times = torch.randn(2, n, 24), (torch.rand(2, n) * 9).sort(1)[0]
            lengths = torch.tensor([n, n // 2])
            for padded in (x, times):
                torch._dynamo.mark_dynamic(padded, 1)
            compare(compiled, model, x, lengths, times, weight=weights(lengths, *x.shape))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "layout, backend, windows",
    [
        ("padded", "inductor", (5,)),
        ("padded", "aot_eager", (None, 5)),
        ("packed", "aot_eager", (None, 5)),
        ("given packed", "aot_eager", (None, 5)),
    ],
)
def test_encoders_compile_to_one_graph_for_every_batch(layout, backend, windows, inductor):
    """A whole encoder in training, with dropout; (B, N) is unpadded inside the graph."""
    config = replace(MODERN, num_layers=len(windows), windows=windows, attention_dropout=0.1)
    model = seeded(Encoder, config)
    compiled = inductor(model, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((33, 9), (5, 65, 30), (17, 2, 1, 7)):
            ids = torch.randint(0, 101, (len(lengths), max(lengths)))
            weight = weights(torch.tensor(lengths), *ids.shape, config.hidden_size)
            batch = {"lengths": torch.tensor(lengths), "layout": layout}
            if layout == "given packed":
                real = weight[..., 0] != 0
                ids, weight = ids[real], weight[real]
                batch = {"cu_seqlens": torch.tensor((0, *lengths)).cumsum(0).int()}
            compare(compiled, model, ids, weight=weight, **batch)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "words", [{}, {"scale": 0.3, "softcap": 3.0, "dropout_p": 0.1}], ids=["defaults", "floats"]
)
def test_calls_follow_each_other_under_dynamic_shapes(words):
    """torch.compile makes symbols of floats that it finds in modules, once for all calls."""
    torch._dynamo.reset()

    def call(q, k, v):
        return fused_attention(fused_attention(q, k, v, **words), k, v, **words)

    inputs = [torch.randn(2, 2, 40, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (compiled, call):
        torch.manual_seed(1)
        o = function(*inputs)
        results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)  # dk and dv of the calls are added in another order


def test_the_function_follows_itself_under_dynamic_shapes():
    torch._dynamo.reset()
    call = lambda q, k, v: FusedAttention.apply(FusedAttention.apply(q, k, v), k, v)
    inputs = [torch.randn(2, 2, 40, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*inputs), call(*inputs))
