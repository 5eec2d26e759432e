"""Compiled linear layers with what follows the product: every form, type and instruction set."""

from __future__ import annotations

from itertools import product as all_of

import pytest
import torch
import torch.nn.functional as F
from linear_products import COMPILED
from slow_philox import keep_mask
from support import dtype_id
from torch import nn

from clinattn.encoder.linear import WITHOUT_LAYERS, by_torch, linear
from clinattn.encoder.linear_op import Dropped, Form, Linear, activated, run

pytestmark = COMPILED
FLOAT, HALF = torch.float32, torch.bfloat16
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu")
SHAPES = [(1, 40, 64), (13, 130, 98), (300, 97, 66), (70, 700, 36)]  # rows, depth, features


class Case:
    """A layer, its input, residual and norm in a dtype; and in fp64, from the same numbers."""

    def __init__(self, shape, dtype, gated=False, residual=None, norm=None, stream=None):
        torch.manual_seed(0)
        rows, depth, features = shape
        columns = features // 2 if gated else features
        self.gated = gated
        self.layer = nn.Linear(depth, features).to(dtype)
        self.x = torch.randn(rows, depth).to(stream or dtype)
        self.residual = torch.randn(rows, columns).to(stream or dtype) if residual else None
        self.norm = {None: None, "layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm]
        if self.norm:
            self.norm = self.norm(columns, eps=1e-5)
            for p in self.norm.parameters():
                nn.init.normal_(p, 1, 0.5)
            self.norm.to(stream or dtype)

    def results(self, function, activation, leaves=False):
        if not leaves:
            with torch.no_grad():
                return [self._call(function, activation)]
        inputs = [a for a in (self.x, self.residual) if a is not None]
        inputs = [a.requires_grad_() for a in inputs] + list(self.layer.parameters())
        y = self._call(function, activation)
        mark = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, inputs, mark)]

    def _call(self, function, activation):
        return function(
            self.layer, self.x, activation=activation, gated=self.gated,
            residual=self.residual, norm=self.norm,
        )  # fmt: skip

    def double(self):
        """The same numbers as fp64."""
        self.layer.double()
        self.x, self.residual = (
            None if a is None else a.detach().double() for a in (self.x, self.residual)
        )
        if self.norm:
            self.norm.double()
        return self


def assert_close(ours, theirs, exact):
    """Error at most twice that of torch's own calls, plus two units of the largest result."""
    for i, (own, other, wanted) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = ((a.double() - wanted).abs().max() for a in (own, other))
        unit = torch.finfo(own.dtype).eps * wanted.abs().max()
        assert error <= 2 * allowed + 2 * unit, (i, error, allowed, unit)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "gated", "residual", "norm"),
    [
        *all_of(ACTIVATIONS, [False, True], [False], [None]),
        *all_of([None, "gelu"], [False, True], [True], [None, "layer", "rms"]),
    ],
)
@pytest.mark.parametrize("leaves", [False, True], ids=["inference", "gradients"])
def test_every_form(instruction_set, shape, dtype, activation, gated, residual, norm, leaves):
    case = Case(shape, dtype, gated, residual, norm)
    ours = case.results(linear, activation, leaves)
    theirs = case.results(by_torch, activation, leaves)
    assert [a.dtype for a in ours] == [a.dtype for a in theirs]
    assert_close(ours, theirs, case.double().results(by_torch, activation, leaves))


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=dtype_id)
@pytest.mark.parametrize("activation", ["gelu", None])
def test_autocast_and_a_stream_of_fp32(instruction_set, dtype, activation):
    """Weights of fp32 under autocast, or of bf16: the residual stays fp32.

    Products are of bf16 where an instruction set has such, else of the numbers as they are.
    """
    case = Case((70, 130, 98), dtype, residual=True, norm="layer", stream=FLOAT)
    exact = Case((70, 130, 98), dtype, residual=True, norm="layer", stream=FLOAT)
    if instruction_set in ("avx512_bf16", "amx"):
        with torch.no_grad():
            exact.layer.weight.copy_(exact.layer.weight.bfloat16())
            exact.x.copy_(exact.x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == FLOAT):
        (ours,) = case.results(linear, activation)
    (wanted,) = exact.double().results(by_torch, activation)
    if instruction_set in WITHOUT_LAYERS:
        return
    assert ours.dtype == FLOAT
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=dtype_id)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_bits_do_not_depend_on_other_rows_or_threads(instruction_set, threads, dtype, gated):
    if instruction_set in WITHOUT_LAYERS:
        pytest.skip("needs AVX2 and more")
    rows = 260 if instruction_set == "amx" and dtype == FLOAT else 1
    case = Case((700, 300, 130), dtype, gated, residual=True, norm="layer")
    threads(1)
    (wanted,) = case.results(linear, "gelu")
    x, residual = case.x, case.residual
    for number in (1, 2, 3, 5):
        threads(number)
        for begin in (0, 7, 440):
            for end in {begin + rows, begin + rows + 40, 700}:
                case.x, case.residual = x[begin:end], residual[begin:end]
                assert torch.equal(case.results(linear, "gelu")[0], wanted[begin:end])


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=dtype_id)
def test_a_weight_that_is_packed_piece_by_piece(instruction_set, dtype):
    """More than 24 MiB of packed strips: a row is normalised when it has all of its columns."""
    columns = 18_000 if dtype == HALF else 9_000
    case = Case((300, 800, columns), dtype, residual=True, norm="layer")
    ours, theirs = case.results(linear, "gelu"), case.results(by_torch, "gelu")
    assert_close(ours, theirs, case.double().results(by_torch, "gelu"))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients_of_gradients(activation, gated):
    case = Case((290, 140, 260), FLOAT, gated, residual=True)

    def second(function):
        x = case.x.requires_grad_()
        inputs = [x, case.layer.weight, case.layer.bias]
        y = case._call(function, activation)
        grads = torch.autograd.grad(y, inputs, torch.cos(y.detach()) * y, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in grads), inputs)

    ours, theirs = second(linear), second(by_torch)
    case.double()
    for own, other, wanted in zip(ours, theirs, second(by_torch), strict=True):
        assert (own - wanted).norm() <= 1.5 * (other - wanted).norm()


@pytest.mark.parametrize("function", ["gelu", "gelu_tanh"])
def test_activation_of_every_size(instruction_set, function):
    """x Phi(x) from -40 to 40: two units of the result, and half a unit of Phi = 1."""
    if instruction_set in WITHOUT_LAYERS:
        pytest.skip("needs AVX2 and more")
    x = torch.linspace(-40, 40, 40001)
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    form = Form(function, False, False, FLOAT)
    y = run(form, x[:, None], layer.weight.detach(), None)[0][:, 0]
    approximate = "tanh" if function == "gelu_tanh" else "none"
    wanted = F.gelu(x.double(), approximate=approximate)
    error = (y - wanted).abs()
    assert (error <= 2.0**-22 * wanted.abs() + 2.0**-25 * x.abs()).all()
    theirs = (F.gelu(x, approximate=approximate) - wanted).abs()
    assert error.max() <= 2 * theirs.max()


@pytest.mark.parametrize("dropout_p", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_dropout_drops_the_pairs_of_attention(instruction_set, activation, gated, dropout_p):
    """Row and column are a query and a key: the mask is that of the definition, both ways."""
    if instruction_set in WITHOUT_LAYERS:
        pytest.skip("needs AVX2 and more")
    seed, case = 2**61 + 12345, Case((290, 140, 260), FLOAT, gated, residual=True)
    columns = case.residual.shape[1]
    kept = keep_mask(seed, dropout_p, [0], 1, range(290), range(columns))[0, 0]
    factor = kept.double() * (0 if dropout_p == 1 else 1 / (1 - round(dropout_p * 2**24) / 2**24))
    inputs = [case.x, case.layer.weight, case.layer.bias, case.residual]
    leaves = [a.detach().requires_grad_() for a in inputs]
    y = Linear.run(Form(activation, gated, False, FLOAT), Dropped(dropout_p, seed), *leaves)[0]
    mark = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, leaves, mark)]
    x, weight, bias, residual = leaves = [a.detach().double().requires_grad_() for a in inputs]
    y = residual + activated(activation, gated, F.linear(x, weight, bias)) * factor
    wanted = [y, *torch.autograd.grad(y, leaves, mark.double())]
    for own, exact in zip(ours, wanted, strict=True):
        assert (own - exact).norm() <= 1e-6 * exact.norm() + 1e-30


def test_dropout_of_a_layer(monkeypatch):
    """The seed is drawn from torch's generator; a dropout with hooks is called itself."""
    case = Case((290, 140, 260), FLOAT, residual=True, norm="layer")
    dropout = nn.Dropout(0.5)
    call = lambda: linear(case.layer, case.x, dropout=dropout, residual=case.residual)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(call())
    assert torch.equal(*results) and not torch.equal(results[0], call())
    assert 0.45 < (results[0] == case.residual).float().mean() < 0.55
    dropout.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
    assert torch.equal(call(), case.residual)
    assert torch.equal(dropout.eval() and call(), case.residual)
