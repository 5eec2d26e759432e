"""The Triton kernels of attention summaries in Triton's interpreter, with small tiles."""

import warnings

import interpreter_bf16  # noqa: F401
import interpreter_patches  # noqa: F401
import pytest
import torch
from cases import CASES, FEATURES
from extremes import LSE_UNITS
from summaries import SummaryProblem
from summary_bits import check_bits, check_nan, check_unread, draw, every_summary
from support import dtype_id

from clinattn import attention_summary, fused_attention
from clinattn.kernels import configs, forward, summary

# "norm" is "received" times numbers that no kernel computes.
REDUCTIONS = ("received", "gradient", "relevance", "entropy", "max", "topk")
# Cases for each way to hide or to change a pair, and for each layout
IDS = (
    "one-key dim-odd mqa scale-negative scale-zero causal-keys-longer causal-queries-longer "
    "window-one-query window0 lengths-causal kv-lengths-empty mask-none-visible-keys "
    "mask-bool-causal mask-float-bh1k mask-float-expanded mask-left-padding-window "
    "strides-reversed strides-expanded logits-1e4-causal packed-no-keys packed-cross-causal "
    "packed-window-causal packed-tail values-192-128 values-lengths alibi-packed-cross "
    "relative-packed softcap-small segments-q-lengths times-window-causal times-left-padding "
    "decay-packed prefix-lengths prefix-left-padding"
).split()
TABLE = [case for case in (*CASES, *FEATURES) if case.id in IDS]
ROUNDED = [case for case in TABLE if case.id in "dim-odd logits-1e4-causal packed-tail".split()]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module in (forward, summary):
        monkeypatch.setattr(module, "tile_config", lambda *_: configs.TileConfig(32, 32, 4, 1))


@pytest.fixture(autouse=True)
def no_arithmetic_warnings():
    """numpy warns of inf - inf in lanes that a tl.where then discards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def check(case, dtype):
    """The lse of 16-bit types is taken in base 2, and is as exact as an lse is promised to be."""
    problem = SummaryProblem(case, dtype)
    lse = problem.forward_lse("triton")
    for reduce in REDUCTIONS:
        actual = problem.summary(reduce, "triton", lse)
        problem.check(reduce, actual, lse_units=0 if dtype == torch.float32 else LSE_UNITS)


def test_every_case_is_there():
    assert {case.id for case in TABLE} == set(IDS)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_fp32_matches_the_matrix(case):
    check(case, torch.float32)


@pytest.mark.parametrize("case", ROUNDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_16_bit_matches_the_matrix(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("keywords", [{}, {"window": (20, 9)}], ids=str)
def test_bits_alone_padded_and_packed(keywords):
    members = draw(torch.bfloat16, (40, 1, 33), heads=1, dim=24)
    alone = [every_summary("triton", *x, **keywords) for x in members]
    check_bits(members, alone, "triton", **keywords)


def test_a_nan_reaches_what_sees_it():
    check_nan("triton", torch.float32, 70)


def test_a_query_of_weight_0_is_not_read():
    check_unread("triton", 40)


def test_every_k():
    """Each is the beginning of the largest; of equal weights the first keys come first."""
    q, k = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 12, 16).repeat_interleave(5, 2)
    lse = fused_attention(q, k, k, return_lse=True, backend="triton")[1]
    call = lambda top: attention_summary(q, k, lse=lse, reduce="topk", k=top, backend="triton")
    values, places = call(16)
    assert (places[..., :-1] % 5 == 4).logical_or(places.diff() == 1).all()
    for top in range(1, 16):
        for actual, expected in zip(call(top), (values, places), strict=True):
            assert torch.equal(actual, expected[..., :top])


def test_a_query_with_fewer_keys_than_k():
    q, k = torch.zeros(1, 1, 3, 16), torch.randn(1, 1, 3, 16)
    _, places = attention_summary(q, k, reduce="topk", k=3, is_causal=True, backend="triton")
    assert places[0, 0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]


def test_a_launch_without_queries_or_keys():
    for nq, nk in ((0, 3), (3, 0)):
        q, k = torch.randn(1, 1, nq, 16), torch.randn(1, 1, nk, 16)
        assert attention_summary(q, k, backend="triton").eq(0).all()
        _, places = attention_summary(q, k, reduce="topk", backend="triton")
        assert places.eq(-1).all()
