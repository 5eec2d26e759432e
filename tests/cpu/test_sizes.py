"""Numbers of all sizes, and those that are none, on every instruction set that runs here."""

import functools

import pytest
import torch
from instruction_sets import BUILT
from support import assert_close, dtype_id

from clinattn import fused_attention, fused_attention_varlen

N, D = 96, 40
NAMES = ("q", "k", "v", "do")

pytestmark = [BUILT, pytest.mark.usefixtures("instruction_set")]
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id
)


def draw(dtype=torch.float32, n=N):
    return {name: torch.randn(1, 2, n, D).to(dtype) for name in NAMES}


def results(attention, q, k, v, do):
    """{"o", "dq", "dk", "dv"}"""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves)
    grads = torch.autograd.grad(o, leaves, do.to(o.dtype))
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def plain(q, k, v):
    return torch.softmax(D**-0.5 * q @ k.mT, -1) @ v


def plainly(inputs, dtype):
    """Plain maths in several orders of summation over keys and features."""
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    found = []
    for _ in range(3):
        j, d = torch.randperm(N), torch.randperm(D)
        q, k = inputs["q"][..., d], inputs["k"][..., j, :][..., d]
        x = results(plain, q, k, inputs["v"][..., j, :], inputs["do"])
        x["dk"], x["dv"] = (x[name][..., j.argsort(), :] for name in ("dk", "dv"))
        x["dq"], x["dk"] = (x[name][..., d.argsort()] for name in ("dq", "dk"))
        found.append(x)
    return found


def check(actual, inputs, rows=slice(None), features=slice(None)):
    """Holds results to fp64, by the errors of plain fp32 in these rows and features alone."""
    (truth, *_), naive = plainly(inputs, torch.float64), plainly(inputs, torch.float32)
    for name, x in actual.items():
        part = lambda y, name=name: y[name][..., rows, :][..., features]
        assert_close(name, part(actual), part(truth), *map(part, naive))
        assert x.isfinite().all()


@dtypes
@pytest.mark.parametrize("keys", [1, 4, 64, 1024])
def test_lse_is_as_exact_as_fp32(keys, dtype):
    q, k, v = (torch.randn(1, 2, n, 64).to(dtype) for n in (512, keys, keys))
    _, lse = fused_attention(q, k, v, return_lse=True)
    s = q.double() @ k.double().mT / 8
    largest = max(1.0, s.abs().max().item(), s.logsumexp(-1).abs().max().item())
    assert (lse - s.logsumexp(-1)).abs().max() <= 4 * torch.finfo(torch.float32).eps * largest


@dtypes
def test_one_key_gives_its_value_and_takes_its_gradient(dtype):
    q, k, v, do = (torch.randn(300, 2, 64).to(dtype) for _ in range(4))
    cu_seqlens = torch.arange(301, dtype=torch.int32)
    attention = lambda q, k, v: fused_attention_varlen(q, k, v, cu_seqlens, max_seqlen_q=1)
    found = results(attention, q, k, v, do)
    if dtype == torch.float32:
        torch.testing.assert_close(found["o"], v, rtol=3e-7, atol=0)
        torch.testing.assert_close(found["dv"], do, rtol=3e-7, atol=0)
    else:
        assert torch.equal(found["o"], v) and torch.equal(found["dv"], do)


VISIBLE = {
    "documents": {"segment_ids": (torch.arange(N) > 32).int()[None]},
    "window": {"window": (10, 3)},
    "causal": {"is_causal": True},
    "causal documents": {"segment_ids": (torch.arange(N) > 32).int()[None], "is_causal": True},
}


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("seen", VISIBLE)
def test_what_is_no_number_reaches_only_those_that_see_it(seen, what, value, dtype):
    inputs = draw(dtype)
    inputs[what][:, :, 32] = value
    attention = functools.partial(fused_attention, **VISIBLE[seen])
    found = results(attention, *inputs.values())
    expected = results(functools.partial(attention, backend="reference"), *inputs.values())
    for name, x in found.items():
        odd = ~x.isfinite() & expected[name].isfinite()
        assert not odd.any(), f"{name}: rows {odd.any(-1).nonzero()[:, -1].unique().tolist()}"


@pytest.mark.parametrize("power", [-104, -110, -116, -120])
@pytest.mark.parametrize("what", NAMES)
def test_a_small_feature_keeps_its_digits(what, power):
    inputs = draw()
    inputs[what][..., 5] *= 2.0**power
    check(results(fused_attention, *inputs.values()), inputs, features=5)


@pytest.mark.parametrize("power", [-104, -116, -124])
@pytest.mark.parametrize("what", NAMES)
def test_a_small_row_keeps_its_digits(what, power):
    inputs = draw()
    inputs[what][..., 7, :] *= 2.0**power
    check(results(fused_attention, *inputs.values()), inputs, rows=7)


@pytest.mark.parametrize("power", [-115, -100, -60, -30, -12, 12])
@pytest.mark.parametrize("what", [*NAMES, "q k", "v do"])
def test_all_of_one_size(what, power):
    inputs = draw()
    for name in what.split():
        inputs[name] *= 2.0 ** (power / len(what.split()))
    check(results(fused_attention, *inputs.values()), inputs)


@pytest.mark.parametrize("power", [40, 90])
@pytest.mark.parametrize("what", ["v", "do"])
def test_all_of_a_large_size(what, power):
    inputs = draw()
    inputs[what] *= 2.0**power
    check(results(fused_attention, *inputs.values()), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_largest_values_do_not_overflow(dtype):
    inputs = draw(dtype)
    inputs["v"] /= inputs["v"].abs().max()
    ordinary = fused_attention(*(inputs[x] for x in "qkv"))
    inputs["v"] *= 2.0**126
    assert torch.equal(fused_attention(*(inputs[x] for x in "qkv")) * 2.0**-126, ordinary)


@pytest.mark.parametrize("powers", [(-70, 70), (70, -70), (-50, 60)], ids=str)
def test_small_features_of_q_meet_large_ones_of_k(powers):
    inputs = draw()
    for name, power in zip("qk", powers, strict=True):
        inputs[name][..., 3] *= 2.0**power / 4
        inputs[name][..., 9] *= 2.0 ** -power / 4
    inputs["q"][..., 3] *= 2.0 ** -sum(powers)
    inputs["k"][..., 9] *= 2.0 ** sum(powers)
    o = fused_attention(*(inputs[name] for name in "qkv"))
    check({"o": o}, inputs)


def test_a_large_neighbour_changes_no_bits():
    """Nor does it make small ones lose their digits."""
    inputs = {name: torch.randn(2 * N, 2, D) for name in NAMES}
    for name, power in {"q": 0, "k": 0, "v": -100, "do": -20}.items():
        inputs[name][:N] *= 2.0**power
    for name, power in {"q": 19, "k": -22, "v": 100, "do": 15}.items():
        inputs[name][N:] *= 2.0**power
    cu_seqlens = torch.tensor([0, N, 2 * N], dtype=torch.int32)
    both = results(lambda *x: fused_attention_varlen(*x, cu_seqlens), *inputs.values())
    first = {name: x[:N] for name, x in inputs.items()}
    alone = results(lambda *x: fused_attention_varlen(*x, cu_seqlens[:2]), *first.values())
    for name, x in alone.items():
        assert torch.equal(both[name][:N], x), name
        assert (x != 0).any()


@dtypes
@pytest.mark.parametrize("value", [torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_infinity_means_what_it_means_in_plain_maths(what, value, dtype):
    inputs = draw(dtype, n=128)  # whole tiles: nothing is hidden
    inputs[what][0, 0, 3, 4] = value
    o = fused_attention(*(inputs[name] for name in "qkv"))
    truth, naive = (plain(*(inputs[x].to(t) for x in "qkv")) for t in (torch.float64, dtype))
    assert torch.equal(o.isnan(), truth.isnan())
    assert_close("o", *(x.nan_to_num(0.5, torch.inf, -torch.inf) for x in (o, truth, naive)))
