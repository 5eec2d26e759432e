"""Compiled linear layers in fp32: numbers of every size, infinity and NaN among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_products import COMPILED, assert_near, exact, matrix, product

from clinattn.backends import cpu

pytestmark = COMPILED
FLOAT = torch.finfo(torch.float32)


def times(power):
    def change(x):
        x.mul_(2.0 ** (power // 2)).mul_(2.0 ** (power - power // 2))

    return change


def ordinary(x):
    pass


def some_features(power):
    """Every other feature is of another size."""
    return lambda x: times(power)(x[:, ::2])


def some_features_alone(x):
    """Half of the rows have nothing but the odd features."""
    x[::2, ::2] = 0


def some_rows(power):
    return lambda x: times(power)(x[::3])


def blocks(*powers):
    """Depth beyond a block: blocks whose numbers differ in size add up."""

    def change(x):
        for part, power in zip(x.split(1024, 1), powers, strict=False):
            times(power)(part)

    return change


SIZES = {
    "small-large": (times(-120), times(120)),
    "denormal-large": (times(-130), times(120)),
    "least-large": (times(-147), times(120)),
    "denormal-ordinary": (times(-135), ordinary),
    "denormal-results": (times(-70), times(-72)),
    "vanishing-results": (times(-90), times(-90)),
    "large": (times(60), times(55)),
    "small-features": (some_features(-120), lambda x: x[::2, 1::2].zero_()),
    "small-features-large-weights": (
        some_features(-130),
        lambda x: (some_features(120)(x), x[::2, 1::2].zero_()),
    ),
    "large-features": (some_features(100), some_features_alone),
    "features-far-apart": (some_features(120), lambda x: (times(-60)(x), some_features_alone(x))),
    "small-rows": (some_rows(-110), ordinary),
    "large-rows": (some_rows(100), some_rows(-125)),
    "large-columns": (some_rows(-125), some_rows(110)),
    "blocks": (blocks(90, -30, -149), blocks(-90, 30, 120)),
    "blocks-of-one-side": (blocks(-120, 0, 60), blocks(0, -100, -60)),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("depth", [45, 2100])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes, depth, transposed):
    x, weight = matrix(70, depth, transposed), matrix(50, depth, transposed)
    for change, operand in zip(sizes, (x, weight), strict=True):
        change(operand)
    assert_near(product(x, weight), x, weight)
    bias = torch.randn(50) * exact(x, weight).abs().max().float()
    assert_near(product(x, weight, bias), x, weight, bias)


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 70),) * 2,
    st.integers(1, 1100),
    *(st.tuples(st.integers(-149, 60), st.integers(-149, 60)).map(sorted),) * 2,
    st.sampled_from([0.0, 0.5, 0.99]),
)
def test_any_sizes(rows, columns, depth, x_powers, weight_powers, zeros):
    def drawn(rows, powers):
        x = torch.randn(rows, depth).double()
        x *= torch.randint(powers[0], powers[1] + 1, x.shape).double().exp2()
        return x.float() * (torch.rand(x.shape) >= zeros)

    x, weight = drawn(rows, x_powers), drawn(columns, weight_powers)
    assert_near(product(x, weight), x, weight)


@pytest.mark.parametrize("powers", [(100, 26), (124, 2), (1, 125)], ids=str)
def test_overflow(powers):
    x, weight = torch.randn(70, 300) * 2.0 ** powers[0], torch.randn(50, 300) * 2.0 ** powers[1]
    y, wanted = product(x, weight), exact(x, weight)
    near = (300 * 6 + 8) * 2.0**-24 * exact(x.abs(), weight.abs())
    beyond, within = wanted.abs() - near > FLOAT.max, wanted.abs() + near < FLOAT.max
    assert beyond.any() and within.any() and (beyond | within).sum() > 0.9 * y.numel()
    if cpu.instruction_set() == "amx":  # which scales rows: only results overflow
        assert torch.equal(y[beyond], wanted[beyond].sign().float() * torch.inf)
    else:  # a sum on the way may overflow, and two of them to NaN, as in torch
        assert not y[beyond].isfinite().any()
        within &= exact(x.abs(), weight.abs()) < FLOAT.max
    assert ((y.double() - wanted).abs() <= near)[within].all()


def put(row, column, value):
    def change(x):
        x[row, column] = value

    return change


EVERY = slice(None)


def signs(x):
    x[:, 4], x[1, 5], x[2, 5] = torch.inf, torch.inf, -torch.inf


def beside(x):
    """Infinity beside the largest and the least of numbers"""
    x[::2, 3], x[::2, 4], x[::2, 5] = torch.inf, FLOAT.max, 2.0**-149


def of_all_sizes(x):
    x[::2] = x[::2].sign() * torch.randint(-149, 120, x[::2].shape).double().exp2().float()


def with_zeros(x):
    x[::3, ::2], x[1::3, 3] = 0, 0


SPECIAL = {
    "inf": (put(EVERY, 3, torch.inf), ordinary),
    "minus-inf": (put(EVERY, 3, -torch.inf), ordinary),
    "inf-in-one-row": (put(3, 3, torch.inf), ordinary),
    "inf-of-weights": (ordinary, put(EVERY, 3, torch.inf)),
    "inf-and-inf": (put(EVERY, 3, torch.inf), put(7, 3, -torch.inf)),
    "inf-minus-inf": (signs, ordinary),
    "inf-and-zeros": (put(EVERY, 3, torch.inf), with_zeros),
    "inf-and-bf16": (put(EVERY, 3, torch.inf), lambda x: x.copy_(x.bfloat16())),
    "inf-and-small": (put(EVERY, 3, torch.inf), times(-147)),
    "inf-and-all-sizes": (put(EVERY, 3, torch.inf), of_all_sizes),
    "inf-beside-large": (beside, ordinary),
    "nan": (put(EVERY, 3, torch.nan), ordinary),
    "nan-rows": (put(slice(None, None, 4), EVERY, torch.nan), ordinary),
    "nan-and-zeros": (put(3, 3, torch.nan), with_zeros),
    "nan-and-inf": (put(3, 3, torch.nan), put(3, 3, torch.inf)),
    "blocks": (put(3, 3, torch.inf), put(EVERY, -1, -torch.inf)),
}


@pytest.mark.parametrize("depth", [45, 1100])
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)
def test_infinity_and_nan(special, depth):
    x, weight = torch.randn(70, depth), torch.randn(50, depth)
    for change, operand in zip(special, (x, weight), strict=True):
        change(operand)
    y, wanted = product(x, weight), exact(x, weight)
    finite = wanted.isfinite()
    assert torch.equal(y[~finite].nan_to_num(7), wanted[~finite].float().nan_to_num(7))
    rows, columns = x.isfinite().all(1), weight.isfinite().all(1)
    assert torch.equal(finite, rows[:, None] & columns)
    if rows.any() and columns.any():
        assert_near(y[rows][:, columns], x[rows], weight[columns])


UNUSUAL = {
    "large": times(60),
    "largest": lambda x: x.fill_(FLOAT.max),
    "small": times(-140),
    "all-sizes": of_all_sizes,
    "inf": put(0, 3, torch.inf),
    "nan": put(0, 3, torch.nan),
}


@pytest.mark.parametrize("power", [0, -70], ids=["ordinary", "denormal-results"])
@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_bits_do_not_depend_on_neighbours_or_threads(change, power, threads):
    x, weight = torch.randn(70, 1100) * 2.0**power, torch.randn(50, 1100) * 2.0**power
    bias = torch.randn(50) * 2.0 ** (2 * power)
    wanted = product(x, weight, bias)
    rows, columns = torch.arange(70) != 5, torch.arange(50) != 35
    change(x[5:6])
    change(weight[35:36])
    y = product(x, weight, bias)
    assert torch.equal(y[rows][:, columns], wanted[rows][:, columns])
    for one in (slice(5, 6), slice(6, 7)):
        assert torch.equal(product(x[one], weight, bias)[0].nan_to_num(7), y[one][0].nan_to_num(7))
    for number in (1, 3):
        threads(number)
        assert torch.equal(product(x, weight, bias).nan_to_num(7), y.nan_to_num(7))
