"""torch.compile: one graph, any shape, the same numbers as eager."""

import warnings
from pathlib import Path

import pytest
import torch
from support import BACKENDS
from torch._dynamo.utils import counters

import clinattn
from clinattn import FusedAttention, fused_attention, fused_attention_varlen

# Compilers allocate through torch.empty themselves.
pytestmark = [pytest.mark.unpoisoned, pytest.mark.parametrize("backend", BACKENDS)]

MASK = torch.rand(2, 1, 1, 40) < 0.7
LENGTHS = torch.tensor([40, 7])
VARIANTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (3, None)},
    "mask": {"attn_mask": MASK},
    "bias": {"attn_mask": torch.randn(40, 40)},
    "lengths": {"kv_lengths": LENGTHS, "q_lengths": LENGTHS},
    "everything": {"attn_mask": MASK, "is_causal": True, "window": 9, "kv_lengths": LENGTHS},
}
TIMES = (torch.rand(2, 40, dtype=torch.float64) * 50).sort(1)[0] + 5e7
FEATURES = {
    "dropout": {"dropout_p": 0.2},
    "segments": {"segment_ids": torch.randint(0, 5, (2, 40)).sort(1)[0], "kv_lengths": LENGTHS},
    "times": {"times": TIMES, "time_window": 9.0, "q_lengths": LENGTHS},
    "decay": {"times": TIMES, "time_decay": torch.rand(2, requires_grad=True)},
    "alibi": {"alibi_slopes": torch.rand(2, requires_grad=True)},
    "relative": {"relative_bias": torch.rand(2, 9, requires_grad=True)},
    "bias": {"attn_mask": torch.rand(2, 40, 40, requires_grad=True)},
    "prefix": {"softcap": 5.0, "global_prefix": 3, "window": 4},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(call, *inputs):
    """Returns the outputs of a call, and the gradients of the sum of their squares."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)
    return [*outputs, *grads]


def assert_same(compiled, eager, *inputs):
    for a, b in zip(results(compiled, *inputs), results(eager, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph(variant, backend):
    inputs = [torch.randn(2, 2, 40, 8) for _ in range(3)]

    def call(q, k, v):
        return fused_attention(q, k, v, backend=backend, return_lse=True, **VARIANTS[variant])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled, call, *inputs)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs)[0], call(*inputs)[0])


def test_no_warning_names_the_package(backend, monkeypatch):
    """Compiles both passes. torch warns once a process: its list of warnings is emptied first."""
    monkeypatch.setattr(torch._dynamo.utils, "warn_once_cache", set())
    inputs = [torch.randn(2, 2, 40, 8) for _ in range(3)]
    call = lambda q, k, v: fused_attention(q, k, v, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results(torch.compile(call, fullgraph=True, backend="aot_eager"), *inputs)
    package = str(Path(clinattn.__file__).parent)
    said = [str(x.message) for x in caught if package in f"{x.filename} {x.message}"]
    assert not said, said


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("variant", FEATURES)
def test_one_graph_with_features(variant, dynamic, backend):
    """Compares gradients of biases and the draws of dropout, too."""
    inputs = [torch.randn(2, 2, 40, 8, requires_grad=True) for _ in range(3)]
    words = FEATURES[variant]
    inputs += [x for x in words.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(q, k, v):
        return fused_attention(q, k, v, backend=backend, **words)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (call, compiled):
        torch.manual_seed(1)
        o = function(*inputs[:3])
        results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_sizes_are_dynamic(backend):
    """One graph serves every length, batch size and number of keys.

    The first sizes are all different: torch.compile takes equal ones to be equal for ever.
    """

    def call(q, k, v):
        return fused_attention(q, k, v, window=(5, 2), backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    counters.clear()
    for batch, nq, nk in ((2, 33, 40), (3, 65, 20), (5, 7, 113)):
        q, k, v = (torch.randn(batch, 3, n, 8) for n in (nq, nk, nk))
        assert_same(compiled, call, q, k, v)
    assert counters["stats"]["unique_graphs"] == 1


def test_packed(backend):
    cu_seqlens = torch.tensor([0, 4, 4, 20]).int()

    def call(q, k, v):
        return fused_attention_varlen(q, k, v, cu_seqlens, is_causal=True, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled, call, *(torch.randn(20, 2, 8) for _ in range(3)))


def test_one_tensor_three_times(backend):
    """torch.compile refuses a Function that is handed the same tensor twice."""

    def call(x):
        return fused_attention(x, x, x, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 9, 8)
    (o, grad), (expected, expected_grad) = (results(f, x) for f in (compiled, call))
    assert torch.equal(o, expected)
    torch.testing.assert_close(grad, expected_grad)  # dq, dk and dv are added in another order


def test_the_function_itself(backend):
    """Where torch.compile traces the Function, its plain call has one output, too."""

    def call(q, k, v):
        return FusedAttention.apply(q, k, v)

    inputs = [torch.randn(2, 2, 9, 8) for _ in range(3)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled, call, *inputs)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), call(*inputs))


def test_autocast(backend):
    def call(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return fused_attention(q, k, v, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(2, 2, 9, 8) for _ in range(3)]
    assert compiled(*inputs).dtype == torch.bfloat16
    assert_same(compiled, call, *inputs)


def test_errors_are_raised_while_tracing(backend):
    q = torch.randn(2, 2, 9, 8)
    call = lambda q: fused_attention(q, q, q[:, :, 1:], backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="value: got shape"):
        compiled(q)


def test_forms_of_other_ranks_and_widths(backend):
    """One batch of keys for all, three dimensions, values of another width."""
    q, k, v = torch.randn(3, 2, 9, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 12)

    def loss(q, k, v):
        o = fused_attention(q, k, v, backend=backend)
        return (o * o.detach().cos()).sum() + fused_attention(k, k, v, backend=backend).sum()

    inputs = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss)]
    torch.testing.assert_close(*grads)


def test_a_layer_under_inductor(backend):
    """Projections around attention, through the default compiler where it finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"torch.compile finds no C++ compiler: {error}")
    weight = torch.randn(24, 8) / 3

    def layer(x):
        q, k, v = (x @ weight.T).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        o = fused_attention(q, k, v, is_causal=True, backend=backend)
        return o.transpose(1, 2).flatten(2) + x

    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 9, 8)
    for a, b in zip(results(compiled, x), results(layer, x), strict=True):
        torch.testing.assert_close(a, b)


def test_export(backend):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return fused_attention(q, k, v, backend=backend)

    inputs = tuple(torch.randn(2, 2, 9, 8) for _ in range(3))
    for strict in (True, False):
        exported = torch.export.export(Layer(), inputs, strict=strict)
        assert torch.equal(exported.module()(*inputs), Layer()(*inputs))
        ops = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert "clinattn.attention_forward.default" in ops
