"""Summaries of attention weights on every backend, against the N x N matrix in long double."""

import pytest
import torch
from cases import CASES, FEATURES, Case
from summaries import REDUCTIONS, SUMS, SummaryProblem
from support import BACKENDS, DTYPES, dtype_id

import clinattn
from clinattn import attention_summary, fused_attention

TABLE = [case for case in (*CASES, *FEATURES) if case.dropout is None]
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_reductions = pytest.mark.parametrize("reduce", REDUCTIONS)


@over_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_matches_the_matrix(case, dtype, backend):
    problem = SummaryProblem(case, dtype)
    for reduce in REDUCTIONS:
        problem.check(reduce, problem.summary(reduce, backend))


@over_backends
@over_reductions
def test_of_a_given_normaliser(reduce, backend):
    problem = SummaryProblem(Case("", nq=130, nk=70, heads=4, kv_heads=2, causal=True), DTYPES[0])
    lse = problem.forward_lse(backend)
    problem.check(reduce, problem.summary(reduce, backend, lse))


@over_backends
def test_received_adds_up_to_the_queries(backend):
    q, k = torch.randn(2, 2, 3, 200, 16)
    received = attention_summary(q, k, backend=backend)
    torch.testing.assert_close(received.sum(-1), torch.full((2, 3), 200.0))


@over_backends
def test_equal_weights_come_in_the_order_of_their_keys(backend):
    q = torch.randn(1, 2, 40, 16)
    k = torch.randn(1, 2, 3, 16).repeat_interleave(50, 2)  # three weights, fifty keys each
    values, places = attention_summary(q, k, reduce="topk", k=16, backend=backend)
    first = places[..., :1]
    assert torch.equal(places, first + torch.arange(16)) and (first % 50 == 0).all()
    assert (values == values[..., :1]).all()
    zeros = torch.zeros(1, 2, 40, 16)
    _, places = attention_summary(zeros, k, reduce="topk", k=3, is_causal=True, backend=backend)
    assert places[0, 0, :3].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]


@over_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_queries_that_see_nothing(dtype, backend):
    q, k = torch.randn(2, 1, 2, 40, 16).to(dtype)
    hidden = torch.zeros(40, 40, dtype=torch.bool)
    for reduce in ("received", "entropy", "max"):
        found = attention_summary(q, k, attn_mask=hidden, reduce=reduce, backend=backend)
        assert (found == 0).all(), reduce


@over_backends
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_sizes(shape, backend):
    batch, heads, nq, nk = shape
    q, k = torch.randn(batch, heads, nq, 8), torch.randn(batch, heads, nk, 8)
    assert torch.equal(attention_summary(q, k, backend=backend), torch.zeros(batch, heads, nk))
    entropy = attention_summary(q, k, reduce="entropy", backend=backend)
    assert torch.equal(entropy, torch.zeros(batch, heads, nq))
    values, places = attention_summary(q, k, reduce="topk", k=2, backend=backend)
    assert (values == 0).all() and (places == -1).all() and places.shape == (batch, heads, nq, 2)


@pytest.mark.parametrize("leading", [(), (3,), (2, 2, 3)], ids=str)
def test_every_form(leading):
    """Shapes of torch's own attention: the summary has their leading dimensions."""
    q, k, v, do = torch.randn(4, *leading, 20, 16)
    p = (q @ k.mT / 4).softmax(-1)
    weights = torch.rand(*leading, 20)
    torch.testing.assert_close(
        attention_summary(q, k, weights=weights), (weights[..., None] * p).sum(-2)
    )
    dp = do @ v.mT
    relevance = attention_summary(q, k, v, do, weights=weights, reduce="relevance")
    torch.testing.assert_close(relevance, (weights[..., None] * (p * dp).clamp(min=0)).sum(-2))
    values, places = attention_summary(q, k, reduce="topk", k=4)
    torch.testing.assert_close(values, p.topk(4).values)
    assert places.shape == (*leading, 20, 4)


def test_weights_broadcast():
    q, k = torch.randn(2, 2, 3, 30, 16)
    every = attention_summary(q, k, weights=torch.full((2, 3, 30), 2.0))
    for weights in (torch.tensor(2.0), torch.full((30,), 2.0), torch.full((2, 1, 30), 2.0)):
        assert torch.equal(attention_summary(q, k, weights=weights), every)


def test_has_no_gradient_and_keeps_none():
    q, k = torch.randn(2, 1, 2, 30, 16, requires_grad=True)
    assert not attention_summary(q, k).requires_grad


def test_vmap_compile_and_meta():
    q, k = torch.randn(2, 5, 2, 2, 30, 16)
    expected = torch.stack([attention_summary(x, y) for x, y in zip(q, k, strict=True)])
    assert torch.equal(torch.func.vmap(attention_summary)(q, k), expected)
    shapes = attention_summary(q[0].to("meta"), k[0].to("meta"), reduce="topk", k=3)
    assert [x.shape for x in shapes] == [(2, 2, 30, 3)] * 2


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        ({"reduce": "mean"}, ValueError, "reduce: got 'mean', expected one of received"),
        ({"reduce": "norm"}, ValueError, "value: got None"),
        ({"reduce": "relevance"}, ValueError, "value: got None"),
        ({"dropout_p": 0.1}, TypeError, "dropout_p: got one"),
        ({"return_lse": True}, TypeError, "return_lse: got one"),
        ({"reduce": "topk", "k": 17}, ValueError, "k: got 17, expected 1 to 16"),
        ({"reduce": "topk", "k": 0}, ValueError, "k: got 0, expected 1 to 16"),
        ({"reduce": "max", "weights": torch.ones(5)}, ValueError, "weights: got some"),
        ({"weights": torch.ones(7)}, ValueError, r"weights: got shape \(7,\), expected"),
        ({"weights": torch.ones(5, dtype=torch.int64)}, TypeError, "weights: got torch.int64"),
        ({"lse": torch.ones(1, 2, 4)}, ValueError, "lse: got shape"),
        ({"lse": torch.ones(1, 2, 5).double()}, TypeError, "lse: got torch.float64"),
        ({"max_seqlen_q": 5}, ValueError, "max_seqlen_q: got one without cu_seqlens_q"),
        ({"colour": 1}, TypeError, "colour"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot be used"),
    ],
)
def test_refusals(keywords, error, message):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(error, match=message):
        attention_summary(q, q, **keywords)


def test_a_wrong_cotangent_is_refused():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="do: got shape"):
        attention_summary(q, q, q, q[..., :3], reduce="gradient")


def test_gradient_is_what_the_backward_pass_says():
    """sum_i p_ij dp_ij = dv_j . v_j, since dv_j = sum_i p_ij do_i."""
    q, k, v, do = torch.randn(4, 2, 3, 50, 16).requires_grad_().unbind(0)
    (dv,) = torch.autograd.grad(fused_attention(q, k, v), [v], do)
    torch.testing.assert_close(
        attention_summary(q, k, v, do, reduce="gradient"), (dv * v).sum(-1).detach()
    )


def test_is_public():
    assert "attention_summary" in clinattn.__all__
    assert set(SUMS) < set(REDUCTIONS)
