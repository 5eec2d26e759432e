"""The bare call: the bits of the long way, taken where nothing else is asked, and nowhere else."""

import warnings

import pytest
import torch
from support import BACKENDS, dtype_id
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import clinattn
from clinattn import fused_attention
from clinattn.backends import select
from clinattn.operator import bare

pytestmark = pytest.mark.skipif(
    "cpu" not in BACKENDS, reason="the compiled backend is not built here"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "negative": {"scale": -0.3, "is_causal": True},
}
SHAPES = {
    "one token": ((2, 3, 1, 8), 1, 8),
    "odd": ((2, 3, 7, 33), 7, 33),
    "more keys": ((1, 2, 5, 16), 40, 16),
    "wider values": ((1, 2, 65, 16), 65, 40),
    "no tokens": ((2, 3, 0, 8), 0, 8),
    "no sequences": ((0, 3, 4, 8), 4, 8),
}


def drawn(shape, n_keys, value_dim, dtype=torch.float32):
    """q, k, v and do."""
    *leading, n_queries, dim = shape
    sizes = (n_queries, dim), (n_keys, dim), (n_keys, value_dim), (n_queries, value_dim)
    return [torch.randn(*leading, *size).to(dtype) for size in sizes]


@pytest.fixture
def taken(monkeypatch):
    """The names of the bare ops that calls have taken."""
    names = []
    for name in ("OUTPUT", "FORWARD", "BACKWARD"):
        op = getattr(bare, name)

        def recorded(*args, name=name, op=op):
            results = op(*args)  # raises where it refuses the call
            names.append(name)
            return results

        monkeypatch.setattr(bare, name, recorded)
    return names


def leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("keywords", CALLS.values(), ids=CALLS)
def test_bits_are_those_of_the_long_way(taken, keywords, shape, dtype):
    q, k, v, do = drawn(*shape, dtype)
    o = fused_attention(q, k, v, **keywords)
    mine, other = leaves(q, k, v), leaves(q, k, v)
    trained = fused_attention(*mine, **keywords)
    grads = torch.autograd.grad(trained, mine, do)
    assert taken == ["OUTPUT", "FORWARD", "BACKWARD"]
    expected, _ = fused_attention(*other, return_lse=True, **keywords)
    assert len(taken) == 3
    assert torch.equal(o, expected) and torch.equal(trained, expected)
    for name, a, b in zip("qkv", grads, torch.autograd.grad(expected, other, do), strict=True):
        assert torch.equal(a, b), f"d{name}"


def test_gradients_of_some_inputs_and_of_sums(taken):
    q, k, v, _ = drawn((1, 2, 6, 8), 6, 8)
    (only,) = leaves(k)
    (grad,) = torch.autograd.grad(fused_attention(q, only, v).sum(), only)  # do has no strides
    (expected,) = torch.autograd.grad(fused_attention(q, only, v, return_lse=True)[0].sum(), only)
    assert taken == ["FORWARD", "BACKWARD"] and torch.equal(grad, expected)


def test_a_cotangent_of_any_strides(taken):
    q, k, v, do = drawn((1, 2, 6, 8), 6, 8)
    inputs = leaves(q, k, v)
    o = fused_attention(*inputs)
    turned = do.transpose(2, 3).contiguous().transpose(2, 3)
    for a, b in zip(
        torch.autograd.grad(o, inputs, turned, retain_graph=True),
        torch.autograd.grad(o, inputs, do),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert taken == ["FORWARD", "BACKWARD", "BACKWARD"]


def test_gradients_are_differentiated_again():
    inputs = leaves(*drawn((1, 2, 5, 4), 5, 4, torch.float64)[:3])
    assert torch.autograd.gradgradcheck(fused_attention, inputs)


def test_saved_tensors_go_through_hooks(taken):
    inputs, packed = leaves(*drawn((1, 2, 5, 4), 5, 4)[:3]), []
    with saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        fused_attention(*inputs).sum().backward()
    assert len(packed) == 6 and taken == ["FORWARD", "BACKWARD"]


class Marked(Tensor):
    pass


def autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return fused_attention(q, k, v)


def counted(q, k, v):
    with FlopCounterMode(display=False) as counter:
        o = fused_attention(q, k, v)
    assert counter.get_total_flops() > 0
    return o


def forward_mode(q, k, v):
    with forward_ad.dual_level():
        return fused_attention(q, k, v)


LONG_WAYS = {
    "autocast": autocast,
    "dispatch mode": counted,
    "forward mode": forward_mode,
    "vmap": lambda q, k, v: torch.vmap(fused_attention)(q[None], k[None], v[None])[0],
    "subclass": lambda q, k, v: fused_attention(q.as_subclass(Marked), k, v).as_subclass(Tensor),
    "three dimensions": lambda q, k, v: fused_attention(q[0], k[0], v[0])[None],
    "broadcast heads": lambda q, k, v: fused_attention(q, k[:, :1], v[:, :1]),
    "turned": lambda q, k, v: fused_attention(q, k.mT.contiguous().mT, v),
    "numpy's flag": lambda q, k, v: fused_attention(q, k, v, is_causal=torch.tensor(False)),
    "an int": lambda q, k, v: fused_attention(q, k, v, scale=1),
    "a mask": lambda q, k, v: fused_attention(q, k, v, torch.ones(q.shape[2], k.shape[2]).bool()),
    "lse": lambda q, k, v: fused_attention(q, k, v, return_lse=True)[0],
    "backend": lambda q, k, v: fused_attention(q, k, v, backend="cpu"),
}


@pytest.mark.parametrize("call", LONG_WAYS.values(), ids=LONG_WAYS)
def test_other_calls_go_the_long_way(taken, call):
    q, k, v, _ = drawn((1, 2, 6, 8), 6, 8)
    o = call(q, k, v)
    assert not taken and o.shape == q.shape and o.isfinite().all()


@pytest.mark.parametrize("variable", ["reference", "cpu", ""])
def test_the_variable_is_read_at_every_call(taken, monkeypatch, variable):
    q, k, v, _ = drawn((1, 2, 6, 8), 6, 8)
    monkeypatch.setenv("CLINATTN_BACKEND", variable)
    fused_attention(q, k, v)
    assert taken == ([] if variable == "reference" else ["OUTPUT"])
    monkeypatch.setenv("CLINATTN_BACKEND", "no such")
    with pytest.raises(ValueError, match="got 'no such'"):
        fused_attention(q, k, v)
    monkeypatch.delenv("CLINATTN_BACKEND")
    fused_attention(q, k, v)
    assert taken[-1] == "OUTPUT"


def test_another_backend_behind_the_name_is_asked(taken):
    q, k, v, _ = drawn((1, 2, 6, 8), 6, 8)
    asked = []
    other = select.Backend("cpu", lambda device: asked.append(device) or ["away"], lambda: None)
    before = select.register(other)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fused_attention(q, k, v)
    finally:
        select.register(before)
    assert asked and not taken


def test_ranges_name_the_pass(taken):
    q, k, v, _ = drawn((1, 2, 6, 8), 6, 8)
    with clinattn.ranges.recording(nvtx=False):
        fused_attention(q, k, v)
    assert not taken


def test_wide_heads_are_served_by_the_reference(taken):
    q, k, v, _ = drawn((1, 1, 3, 300), 3, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fused_attention(q, k, v).shape == q.shape
    assert not taken


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 3, 4), (2, 3, 4)), "expected four dimensions"),
        (((1, 4, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), "as many heads"),
        (((2, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), "k has shape"),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 4, 8)), "v has shape"),
    ],
    ids=["rank", "heads", "batch", "values"],
)
def test_the_op_refuses(shapes, message):
    q, k, v = (torch.randn(shape) for shape in shapes)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.clinattn.cpu_bare_output(q, k, v, False, None)
