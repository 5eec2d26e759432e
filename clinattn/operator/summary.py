"""Summaries of attention weights in O(N) memory: the weights are formed again and not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.backends import call as records
from clinattn.backends.call import MAX_TOP, Arguments, Summary
from clinattn.operator import ops, split
from clinattn.operator.assemble import dense_call, packed_call
from clinattn.operator.jagged import is_jagged
from clinattn.operator.words import checks
from clinattn.operator.words.forms import DenseForm
from clinattn.operator.words.scalars import as_int

SUMMARY = torch.ops.clinattn.attention_summary.default

# Each word of `reduce`, and the number of what a backend computes for it
REDUCTIONS = {
    "received": records.RECEIVED,
    "norm": records.RECEIVED,
    "gradient": records.GRADIENT,
    "relevance": records.RELEVANCE,
    "entropy": records.ENTROPY,
    "max": records.MAX,
    "topk": records.TOPK,
}
# The arguments that a word needs beside query and key
NEEDS = {"norm": ("value",), "gradient": ("value", "do"), "relevance": ("value", "do")}


def attention_summary(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    do: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    reduce: str = "received",
    k: int = 8,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str | None = None,
    **words: Any,
) -> Any:
    """Summarises the weights p of attention without an N x N matrix.

    p_ij = exp(s_ij - lse_i), with the scores s of the call. reduce says what is returned, in fp32
    (fp64 for fp64 inputs), with w_i the weight of query i and dp_ij = do_i . v_j:

    - "received": sum_i w_i p_ij, the attention that each key gets;
    - "norm": sum_i w_i p_ij |v_j|, the same by the length of its value (Kobayashi et al., 2020);
    - "gradient": sum_i w_i p_ij dp_ij, attention times its gradient;
    - "relevance": sum_i w_i max(p_ij dp_ij, 0), a row of it (Chefer et al., 2021);
    - "entropy": -sum_j p_ij ln p_ij of each query, in nats; 0 for one that sees no key;
    - "max": the largest p_ij of each query;
    - "topk": (values, places) of the k largest p_ij of each query, descending, and int64 places of
      their keys in the sequence. Of equal weights the first key's comes first. A query with fewer
      than k weights above 0 has values of 0 and places of -1 behind them.

    query, key, value: as in fused_attention; or packed, with cu_seqlens_q and what else
    fused_attention_varlen takes. value: for "norm", "gradient" and "relevance". do: like the output
    of attention, the gradient of a number (a logit) to it, for "gradient" and "relevance".
    lse: of the same call, as return_lse=True gives it; left out, it is computed, at 0.6
    to 0.8 of the cost of a forward pass.
    weights: (B, H, Nq), packed (H, Tq), or what broadcasts to it; of sums over queries, default 1.
    A query of weight 0 is not read: give 0 to padding that masks and lengths do not name.
    k: 1 to 16.
    words: the other arguments of fused_attention, or of fused_attention_varlen, but dropout_p and
    return_lse.

    Returns (B, H, Nk) for sums over queries, of each query head, packed (H, Tk); (B, H, Nq) or (H,
    Tq) for numbers by query; with k behind it for "topk". The result has no gradient. Its bits do
    not depend on the batch, on padding, on packing and on the number of threads.
    Raises TypeError or ValueError for wrong or missing arguments, and otherwise as fused_attention.
    """
    split.refuse("attention_summary")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: got {reduce!r}, expected one of {', '.join(REDUCTIONS)}")
    for name in ("dropout_p", "return_lse"):
        if name in words:
            raise TypeError(f"{name}: got one, expected none: a summary is of all weights")
    given = {"value": value, "do": do}
    for name in NEEDS.get(reduce, ()):
        if given[name] is None:
            raise ValueError(f"{name}: got None, expected a tensor for reduce={reduce!r}")
    sums = REDUCTIONS[reduce] < records.ENTROPY
    if weights is not None and not sums:
        raise ValueError(f"weights: got some, expected None for reduce={reduce!r}")
    top = as_int("k", k)
    if not 1 <= top <= MAX_TOP:
        raise ValueError(f"k: got {top}, expected 1 to {MAX_TOP}")
    if any(isinstance(x, Tensor) and is_jagged(x) for x in (query, key)):
        raise NotImplementedError(
            "query: got a nested tensor, expected values() with cu_seqlens_q=offsets()"
        )
    with torch.no_grad():
        call, form = _call(
            query, key, value, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), words
        )
        backend = checks.check_backend(backend)
        inputs = Summary(
            *_normaliser(call, form, lse, backend),
            _weights(call, form, weights),
            _cotangent(call, form, do) if reduce in NEEDS and reduce != "norm" else None,
        )
        values, places = SUMMARY(*inputs, *call, REDUCTIONS[reduce], top, backend)
        if reduce == "norm":
            # what no query sees may hold anything
            values = torch.where(values == 0, 0, values * _norms(call, values.dtype))
        if form is not None:
            values = form.as_given(values, 2)
            places = form.as_given(places, 2) if reduce == "topk" else places
    return (values, places) if reduce == "topk" else values


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    lengths: tuple[Any, ...],
    words: dict[str, Any],
) -> tuple[Arguments, DenseForm | None]:
    # Kernels take a v; where its numbers do not count, one of a column costs least.
    v = key[..., :1] if value is None and isinstance(key, Tensor) and key.dim() > 1 else value
    if lengths[0] is not None:
        return packed_call(query, key, v, *lengths, **words), None  # type: ignore[arg-type]
    for name, given in zip(
        ("cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths[1:], strict=True
    ):
        if given is not None:
            raise ValueError(f"{name}: got one without cu_seqlens_q, expected None")
    return dense_call(query, key, v, **words)  # type: ignore[arg-type]


def _normaliser(
    call: Arguments, form: DenseForm | None, lse: Any, backend: str
) -> tuple[Tensor, Tensor | None]:
    if lse is None:
        v = call.k[..., :1]
        return torch.ops.clinattn.attention_forward(*call._replace(v=v), backend)[1:]
    checks.check_on("lse", lse, call.q.device)
    like = ops.lse_like(call.q, call.is_packed())
    expected = _given_shape(like, form)
    if tuple(lse.shape) != expected:
        raise ValueError(f"lse: got shape {tuple(lse.shape)}, expected {expected}")
    if lse.dtype != like.dtype:
        raise TypeError(f"lse: got {lse.dtype}, expected {like.dtype}")
    return lse.reshape(like.shape), None


def _weights(call: Arguments, form: DenseForm | None, weights: Any) -> Tensor | None:
    """Returns the weights of queries in the shape and dtype of lse."""
    if weights is None:
        return None
    checks.check_on("weights", weights, call.q.device)
    if not weights.is_floating_point():
        raise TypeError(f"weights: got {weights.dtype}, expected a floating dtype")
    like = ops.lse_like(call.q, call.is_packed())
    expected = _given_shape(like, form)
    try:
        weights = weights.expand(expected)
    except RuntimeError:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected one that broadcasts to {expected}"
        ) from None
    return weights.to(like.dtype).reshape(like.shape)


def _given_shape(like: Tensor, form: DenseForm | None) -> tuple[int, ...]:
    """Returns the shape of lse with the dimensions that the caller knows."""
    return tuple(like.shape) if form is None else (*form.leading, like.shape[-1])


def _cotangent(call: Arguments, form: DenseForm | None, do: Any) -> Tensor:
    checks.check_on("do", do, call.q.device)
    shape = (*call.q.shape[:-1], call.v.shape[-1])
    expected = shape if form is None else (*form.leading, *shape[-2:])
    if tuple(do.shape) != expected:
        raise ValueError(f"do: got shape {tuple(do.shape)}, expected {expected}")
    if not do.is_floating_point():
        raise TypeError(f"do: got {do.dtype}, expected a floating dtype")
    return do.to(call.q.dtype).reshape(shape)


def _norms(call: Arguments, dtype: torch.dtype) -> Tensor:
    """Returns |v_j| for each query head."""
    norms = torch.linalg.vector_norm(call.v, dim=-1, dtype=dtype)
    if call.is_packed():
        norms = norms.transpose(0, 1)
    return norms.repeat_interleave(call.q.shape[1] // call.k.shape[1], -2)
