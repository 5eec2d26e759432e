"""rotary under torch.compile, torch.func, autocast and opcheck, and what its op promises."""

import importlib

import pytest
import torch
from support import BACKENDS
from torch._dynamo.utils import counters

from clinattn import fused_attention, rotary

OP = torch.ops.clinattn.rotary.default
over_backends = pytest.mark.parametrize("backend", BACKENDS)
CU_SEQLENS = torch.tensor([0, 4, 4, 9]).int()
VARIANTS = {
    "dense": {},
    "partial": {"rotary_dim": 4, "interleaved": True},
    "packed": {"cu_seqlens": CU_SEQLENS},
}


def draw(variant, dtype=torch.float32):
    """q, k and positions of 9 tokens."""
    shape = (9, 2, 8) if variant == "packed" else (3, 2, 9, 8)
    q, k = torch.randn(2, *shape).to(dtype)
    return q, k, torch.rand(9) * 100


def results(call, *inputs):
    """Returns the outputs of a call, and the gradients of the sum of their squares for q and k."""
    q, k, *rest = inputs
    q, k = (x.detach().requires_grad_() for x in (q, k))
    outputs = call(q, k, *rest)
    grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), (q, k))
    return [*outputs, *grads]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.unpoisoned
@over_backends
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph(variant, backend, fresh_compiler):
    call = lambda q, k, at: rotary(q, k, at, backend=backend, **VARIANTS[variant])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = draw(variant)
    assert all(map(torch.equal, results(compiled, *inputs), results(call, *inputs)))
    with torch.no_grad():
        assert all(map(torch.equal, compiled(*inputs), call(*inputs)))


@pytest.mark.unpoisoned
@over_backends
def test_sizes_are_dynamic(backend, fresh_compiler):
    call = lambda q, k, at: rotary(q, k, at, backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    counters.clear()
    for batch, n in ((2, 33), (5, 65), (3, 7)):
        inputs = torch.randn(batch, 4, n, 8), torch.randn(batch, 3, n, 8), torch.rand(batch, n)
        assert all(map(torch.equal, results(compiled, *inputs), results(call, *inputs)))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.unpoisoned
@over_backends
def test_one_tensor_twice_and_attention(backend, fresh_compiler):
    def call(x, at):
        q, k = rotary(x, x, at, backend=backend)
        return fused_attention(q, k, x, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, _, at = draw("dense")
    assert torch.equal(compiled(x, at), call(x, at))


@over_backends
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, variant, backend):
    q, k, at = draw(variant, dtype)
    math = torch.float64 if dtype == torch.float64 else torch.float32
    width = 4 if variant == "partial" else 8
    args = at.to(math), torch.rand(width // 2, dtype=math), variant == "partial", False
    for change in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(OP, (change(q), change(k), *args, backend))
        if backend == "cpu":
            torch.library.opcheck(
                torch.ops.clinattn.cpu_rotary.default, (change(q), change(k), *args)
            )
    torch.library.opcheck(OP, (q.mT.contiguous().mT, k.flip(0), *args, backend))


@over_backends
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, None), (None, -1, 1)], ids=str)
def test_vmap(dims, variant, backend):
    size = 4
    inputs = []
    for x, dim in zip(draw(variant), dims, strict=True):
        stacked = torch.stack([x + i for i in range(size)])
        inputs.append(x if dim is None else stacked.movedim(0, dim))
    call = lambda q, k, at: rotary(q, k, at, backend=backend, **VARIANTS[variant])
    actual = torch.func.vmap(call, in_dims=dims)(*inputs)
    for i in range(size):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True)]
        assert all(map(torch.equal, [x[i] for x in actual], call(*one)))


@over_backends
def test_vmap_over_rows_of_positions(backend):
    q, k, _ = draw("dense")
    at = torch.rand(4, 3, 9)
    call = lambda at: rotary(q, k, at, backend=backend)
    actual = torch.func.vmap(call)(at)
    for i in range(4):
        assert all(map(torch.equal, [x[i] for x in actual], call(at[i])))


@over_backends
def test_gradients_for_each_sample(backend):
    q, k, at = draw("dense")
    loss = lambda q, k: sum(x.pow(3).sum() for x in rotary(q, k, at, backend=backend))
    each = torch.func.vmap(torch.func.grad(loss))(q[:, None], k[:, None])
    q.requires_grad_()
    (whole,) = torch.autograd.grad(loss(q, k), q)
    torch.testing.assert_close(each[:, 0], whole)


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_leaves_the_dtype(dtype, backend):
    q, k, at = draw("dense", dtype)
    expected = results(lambda q, k: rotary(q, k, at, backend=backend), q, k)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(lambda q, k: rotary(q, k, at, backend=backend), q, k)
    assert actual[0].dtype == dtype
    assert all(map(torch.equal, actual, expected))


def test_meta_tensors():
    q = torch.randn(2, 3, 5, 8, device="meta", requires_grad=True)
    at = torch.arange(5, device="meta")
    out, _ = rotary(q, q, at)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == dq.shape == q.shape


def test_forward_mode_is_refused():
    """Forward mode raises, lest its tangents be dropped."""
    q, k, at = draw("dense")
    with pytest.raises(Exception, match="jvp"):
        torch.func.jvp(lambda q: rotary(q, k, at)[0], (q,), (q,))


def test_tensors_are_not_copied_and_keep_their_layout(monkeypatch):
    module = importlib.import_module("clinattn.operator.rotary_op")
    seen = []

    def record(*args):
        seen.append(args)
        return module.reference_rotary(*args)

    monkeypatch.setattr(module, "_load", lambda name: record)
    qkv = torch.randn(2, 9, 3, 4, 8)
    q, k, _ = qkv.transpose(1, 3).unbind(2)
    for turned in rotary(q, k, torch.arange(9)):
        assert turned.stride() == torch.empty_like(q).stride()
    assert [x.data_ptr() for x in seen[0][:2]] == [q.data_ptr(), k.data_ptr()]
    rotary(q.mT.contiguous().mT, k, torch.arange(9))
    assert seen[1][0].stride(-1) == 1
