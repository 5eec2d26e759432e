"""Compiled linear layers in fp32: against fp64, to the bit, and who is asked instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from encoders import CONFIGS, make_batch, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_products import COMPILED, UNIT, assert_near, exact, matrix, product
from support import dtype_id
from torch import nn

from clinattn.backends import compiled, cpu
from clinattn.encoder import Encoder
from clinattn.encoder import linear as linear_module
from clinattn.encoder.linear import linear
from clinattn.encoder.linear_op import run


@COMPILED
@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 300),) * 2,
    st.integers(1, 2200),
    *(st.booleans(),) * 3,
    st.integers(-90, 90),
)
def test_any_shape(rows, columns, depth, x_transposed, weight_transposed, biased, power):
    x = matrix(rows, depth, x_transposed) * 2.0**power
    weight = matrix(columns, depth, weight_transposed)
    bias = torch.randn(columns) if biased else None
    assert_near(product(x, weight, bias), x, weight, bias)


@COMPILED
@pytest.mark.parametrize("depth", [64, 768, 3072])
def test_no_less_exact_than_torch(depth):
    x, weight = torch.randn(256, depth), torch.randn(512, depth)
    wanted = exact(x, weight)
    ours, theirs = ((y - wanted).pow(2).mean().sqrt() for y in (product(x, weight), x @ weight.t()))
    assert ours <= 1.2 * theirs


@COMPILED
@pytest.mark.parametrize("depth", [40, 2100])
def test_bits_do_not_depend_on_neighbours_or_threads(threads, depth):
    x, weight, bias = torch.randn(300, depth), torch.randn(290, depth), torch.randn(290)
    threads(1)
    wanted = product(x, weight, bias)
    for number in (2, 3):
        threads(number)
        assert torch.equal(product(x, weight, bias), wanted)
    assert torch.equal(product(x.t().contiguous().t(), weight, bias), wanted)
    for i in (0, 15, 131, 289):
        one = slice(i, i + 1)
        assert torch.equal(product(x[one], weight, bias)[0], wanted[i])
        assert torch.equal(product(x, weight[one], bias[one])[:, 0], wanted[:, i])


@COMPILED
@pytest.mark.parametrize("depth", [48, 1100])
def test_what_parts_cannot_hold(depth):
    x, weight = torch.randn(70, depth), torch.randn(50, depth)
    x[1], x[2, 3], x[3, 5] = 0, torch.inf, torch.nan
    x[4, 7], x[5] = 3.4e38, torch.finfo(torch.float32).smallest_normal * torch.randn(depth)
    x[6, 1], x[6, 2] = torch.inf, -torch.inf
    x[7] *= 1e-18
    weight[1], weight[2, 3] = 0, -torch.inf
    weight[3] = weight[3].bfloat16().float()  # its later parts are 0, and infinity times 0 is NaN
    weight[4] *= 1e-14
    weight[6] *= 1e-30
    weight[5, 9] = torch.nan
    y, wanted = product(x, weight), exact(x, weight).float()
    special = ~wanted.isfinite()
    assert torch.equal(y[special].nan_to_num(7), wanted[special].nan_to_num(7))
    sizes = exact(x.abs(), weight.abs())
    error = (y.double() - exact(x, weight)).abs()
    bound = (6 * depth + 8) * UNIT * sizes + torch.finfo(torch.float32).smallest_normal
    assert ((error <= bound) | special).all()
    for at in ((5, 0), (7, 4), (0, 6)):  # rows and columns below what parts hold: not flushed
        assert wanted[at] != 0 and y[at] != 0
        if cpu.instruction_set() == "amx":  # where one sum is rounded to fp32 in the end
            torch.testing.assert_close(y[at], wanted[at], rtol=2.0**-23, atol=0)


@COMPILED
def test_gradients_and_their_gradients():
    layer = nn.Linear(300, 400)
    x = torch.randn(2, 260, 300, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    ours, theirs = [linear(layer, x)], [layer(x)]
    exactly = [F.linear(*(t.double() for t in inputs))]
    mark, again = torch.randn(2, 260, 400), [torch.randn_like(t) for t in inputs]
    for ys in (ours, theirs, exactly):
        y = ys[0]
        grads = torch.autograd.grad(y, inputs, mark.to(y.dtype) * y, create_graph=True)
        product_of = sum((g * a).sum() for g, a in zip(grads, again, strict=True))
        ys += [*grads, *torch.autograd.grad(product_of, inputs)]
    for own, other, wanted in zip(ours, theirs, exactly, strict=True):
        assert (own - wanted).norm() <= 1.2 * (other - wanted).norm()


@pytest.fixture
def products(monkeypatch):
    """The shapes that came to the compiled layers."""
    seen = []

    def watched(form, x, weight, *rest, **more):
        seen.append((*x.shape, len(weight)))
        return run(form, x, weight, *rest, **more)

    monkeypatch.setattr(linear_module, "run", watched)
    return seen


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@COMPILED
def test_who_is_served(products):
    layer, x = nn.Linear(288, 320).requires_grad_(False), torch.randn(2, 150, 288)
    with torch.no_grad():
        assert linear(layer, x).shape == (2, 150, 320) and products.pop() == (300, 288, 320)
        half = nn.Linear(288, 320).bfloat16()
        assert linear(half, x.bfloat16()).dtype == torch.bfloat16 and products.pop()
        assert linear(half, x).dtype == torch.bfloat16 and products.pop()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, x).dtype == torch.bfloat16 and products.pop()
            assert linear(layer, x, residual=torch.randn(2, 150, 320)).dtype == torch.float32
            assert products.pop()
        with torch.autocast("cpu", torch.float16):
            assert linear(layer, x).dtype == torch.float16
        wanted = layer(x)
        calls = {
            "a layer's own type": lambda: linear(Doubled(288, 320), x),
            "fp64": lambda: linear(nn.Linear(288, 320).double(), x.double()),
            "fp16": lambda: linear(nn.Linear(288, 320).half(), x.half()),
            "meta": lambda: linear(layer.to_empty(device="meta"), x.to("meta")),
        }
        assert torch.equal(torch.vmap(lambda x: linear(layer, x))(x), torch.vmap(layer)(x))
        traced = torch.jit.trace(lambda x: linear(layer, x), x, check_trace=False)
        assert torch.equal(traced(x), wanted)
        torch.set_float32_matmul_precision("high")
        try:
            linear(layer, x)
        finally:
            torch.set_float32_matmul_precision("highest")
        handle = layer.register_forward_hook(lambda module, args, y: y + 1)
        assert torch.equal(linear(layer, x), wanted + 1)
        handle.remove()
        for call in calls.values():
            call()
    assert not products


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", CONFIGS)
def test_encoders_come_to_the_same(products, monkeypatch, name, dtype):
    ids, lengths = make_batch()
    model = seeded(Encoder, CONFIGS[name]).eval().to(dtype)
    with torch.no_grad():
        ours = model(ids, lengths=lengths)
        few = cpu.instruction_set() == "amx" and dtype == torch.float32
        assert bool(products) == (CONFIGS[name].attention == "clinattn" and not few)
        monkeypatch.setattr(linear_module, "_form", lambda *call: None)
        theirs = model(ids, lengths=lengths)
        wanted = model.double()(ids, lengths=lengths)
    assert (ours - wanted).norm() <= 1.2 * (theirs - wanted).norm()


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3), None, "x is Double"),
        (torch.zeros(2, 3), torch.zeros(2, 4), None, r"weight has shape \[2, 4\]"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), r"bias is Float of shape \[3\]"),
        (torch.zeros(4, 6)[::2, ::2], torch.zeros(4, 3), None, "x has shape .* and strides"),
    ],
)
def test_bad_input_has_a_clear_error(x, weight, bias, message):
    if compiled.compiled_module() is None:
        pytest.skip("needs the compiled module")
    rest = (0, False, 0.0, 0, None, 0, None, None, 0.0, False, torch.float32, None)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.clinattn.cpu_linear(x, weight, bias, *rest)


@COMPILED
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_nothing_to_do(shape):
    rows, columns, depth = shape
    bias = torch.randn(columns)
    y = product(torch.randn(rows, depth), torch.randn(columns, depth), bias)
    assert y.shape == (rows, columns) and (depth or torch.equal(y, bias.expand(rows, columns)))
