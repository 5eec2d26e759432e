"""Numbers of unusual sizes take no longer than ordinary ones, on every instruction set here."""

import statistics
import time

import pytest
import torch
from instruction_sets import BUILT
from linear_products import product
from support import dtype_id

from clinattn import fused_attention
from clinattn.backends import cpu

TRIES = 4  # another where the machine was busy

pytestmark = BUILT


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def times_as_long(unusual, ordinary, rounds):
    """The median of interleaved rounds, the least of a few tries unless one is below 2."""
    ratios = []
    for _ in range(TRIES):
        pairs = [(seconds(unusual), seconds(ordinary)) for _ in range(rounds)]
        ratios.append(statistics.median(a / b for a, b in pairs))
        if ratios[-1] < 2:
            break
    return min(ratios)


def passes(q, k, v, do, scale=None):
    """The forward and the backward pass, each to be called at will."""
    call = lambda: fused_attention(q, k, v, scale=scale, backend="cpu")
    for x in (q, k, v):
        x.requires_grad_()
    o = call()
    return {
        "forward": call,
        "backward": lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True),
    }


def weights_of(spread):
    """q, k, v, do: the weights of keys but the first are 2^-x, x drawn from the spread."""
    q, k, v, do = torch.randn(4, 1, 2, 384, 64)
    q[..., 0] = 1
    q[..., 1:] = k[..., 1:] = 0
    k[..., 0] = torch.empty(384).uniform_(*spread) * -torch.log(torch.tensor(2.0))
    k[..., 0, 0] = 0
    return q, k, v, do


SPREADS = {"wide": (0, 150), "small": (80, 105), "vanishing": (110, 140)}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_vanishing_weights(dtype, spread, instruction_set):
    vanishing = passes(*(x.to(dtype) for x in weights_of(spread)), scale=1.0)
    ordinary = passes(*torch.randn(4, 1, 2, 384, 64).to(dtype))
    for name, call in vanishing.items():
        assert times_as_long(call, ordinary[name], 9) < 2, name


@pytest.mark.parametrize(
    ("what", "factor"), [("do", 1e-30), ("v", 1e-30), ("q", 1e-30), ("v", 1e30)]
)
def test_small_and_large_numbers(what, factor, instruction_set):
    inputs = dict(zip(("q", "k", "v", "do"), torch.randn(4, 1, 2, 512, 64), strict=True))
    unusual = passes(**{name: x * factor if name == what else x for name, x in inputs.items()})
    ordinary = passes(**{name: x.clone() for name, x in inputs.items()})
    for name, call in unusual.items():
        assert times_as_long(call, ordinary[name], 5) < 2, name


def put(rows, columns, value):
    return lambda x: x.__setitem__((rows, columns), value)


EVERY = slice(None)
SLOW_ONCE = {
    "small": lambda x: x.mul_(2.0**-100),
    "denormal": lambda x: x.mul_(2.0**-65).mul_(2.0**-65),
    "large": lambda x: x.mul_(2.0**60),
    "inf": put(EVERY, 3, torch.inf),
    "nan-row": put(3, EVERY, torch.nan),
    "zeros-of-large": lambda x: (x.mul_(2.0**60), x[:, ::2].zero_()),
}


@pytest.mark.skipif(cpu.instruction_set() != "amx", reason="needs AMX")
@pytest.mark.parametrize("change", SLOW_ONCE.values(), ids=SLOW_ONCE)
def test_linear_layers(change):
    x, weight = torch.randn(256, 1024), torch.randn(128, 1024)
    weight[::2, 1::2] = 0
    changed = x.clone()
    change(changed)
    assert times_as_long(lambda: product(changed, weight), lambda: product(x, weight), 3) < 2
