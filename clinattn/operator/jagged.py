"""Jagged nested tensors as packed tokens, and packed results as jagged tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import (  # its public form refuses to be traced
    nested_view_from_values_offsets_lengths,
)

from clinattn.operator.packing import cu_seqlens_from_lengths, token_places


class Tokens(NamedTuple):
    """The tokens of a jagged tensor (B, ..., j, ...), one sequence after the other.

    values (T, ...), a view unless the tensor has holes; cu_seqlens int32 (B + 1,); max_seqlen, None
    where it is not known without reading cu_seqlens; indices int64 (T,), the rows of the tokens in
    the tensor's own values, None where there are no holes; rows, the number of those rows.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int | None
    indices: Tensor | None
    rows: int


def is_jagged(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged


def tokens_of(x: Any) -> Tokens:
    """Returns the tokens of a jagged tensor; differentiable.

    A hole, as torch.nested.narrow leaves them, is not read.
    """
    values = x.values().movedim(x._ragged_idx - 1, 0)
    offsets, lengths, longest = x.offsets(), x.lengths(), _longest(x)
    rows = values.shape[0]
    if lengths is None:
        return Tokens(values, offsets.to(torch.int32), longest, None, rows)
    indices = token_places(offsets[:-1], lengths)
    ends = cu_seqlens_from_lengths(lengths)
    return Tokens(values.index_select(0, indices), ends, longest, indices, rows)


def _longest(x: Any) -> int | None:
    """A bound of the lengths, for a device that is slow to read one; a jagged tensor keeps it."""
    if _is_traced(x.offsets()):
        return x._maybe_max_seqlen
    return x._get_max_seqlen() if x.is_cuda and len(x.offsets()) > 1 else None


def _is_traced(offsets: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(offsets) is not Tensor


def jagged_like(values: Tensor, tokens: Tokens, like: Any, ragged_idx: int) -> Tensor:
    """Returns values (T, ...) as a jagged tensor with the sequences and holes of `like`.

    tokens: those of `like`. ragged_idx: the dimension of the tokens in the result, where they are
    put from the first of values. Holes are filled with zeros. Differentiable.
    """
    if tokens.indices is not None:
        buffer = values.new_zeros(tokens.rows, *values.shape[1:])
        values = buffer.index_copy(0, tokens.indices, values)
    return nested_view_from_values_offsets_lengths(
        values.movedim(0, ragged_idx - 1),
        like.offsets(),
        like.lengths(),
        ragged_idx=ragged_idx,
        min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )


def same_sequences(x: Any, y: Any) -> bool:
    """Returns whether two jagged tensors have sequences of the same lengths.

    A compiler cannot look: there, the same number of sequences and rows of values is enough.
    """
    if x.offsets() is y.offsets() and x.lengths() is y.lengths():
        return True
    lengths = [t.offsets().diff() if t.lengths() is None else t.lengths() for t in (x, y)]
    if any(map(_is_traced, lengths)):
        return lengths[0].shape == lengths[1].shape
    return torch.equal(*lengths)


def check_jagged(query: Any, key: Any, value: Any) -> None:
    """Checks that all are jagged, with tokens in one dimension and one number of sequences."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
        if not is_jagged(x):
            kind = "a strided nested tensor" if x.is_nested else "a dense one"
            raise TypeError(
                f"{name}: got {kind}, expected query, key and value all of layout torch.jagged or "
                "all dense; fused_attention_varlen takes packed ones"
            )
    ranks, ragged = ([getattr(x, n) for x in (query, key, value)] for n in ("ndim", "_ragged_idx"))
    if len(set(ranks)) > 1 or len(set(ragged)) > 1:
        raise ValueError(
            f"query, key and value: got {ranks} dimensions, tokens in {ragged}, expected the same"
        )
    if ragged[0] != ranks[0] - 2 and not (ragged[0] == 1 and ranks[0] > 3):
        raise ValueError(
            f"query: got {ranks[0]} dimensions with tokens in {ragged[0]}, expected (batch, heads, "
            "tokens, head_dim) with tokens in 2, or (batch, tokens, head_dim)"
        )
    if ranks[0] > 4 and ragged[0] != 1:
        raise ValueError(f"query: got {ranks[0]} dimensions, expected at most 4")
    if not len(query.offsets()) == len(key.offsets()) == len(value.offsets()):
        sizes = [len(x.offsets()) - 1 for x in (query, key, value)]
        raise ValueError(f"query, key and value: got {sizes} sequences, expected one number")
    if not same_sequences(key, value):
        raise ValueError("value: got sequences of other lengths than those of key")


def jagged_attention(
    dense: Callable[..., Any],
    packed: Callable[..., Any],
    query: Any,
    key: Any,
    value: Any,
    of_pairs: Mapping[str, Any],
    *,
    times: Any,
    return_lse: bool,
    **words: Any,
) -> Any:
    """fused_attention of jagged tensors, as attention over their packed tokens.

    query: (B, H, j, D); key, value: (B, Hkv, k, D); or (B, j, D) without heads. times: jagged
    (B, j). of_pairs: arguments that no packed call has, by name; ValueError unless they are None.
    dense and packed: fused_attention and fused_attention_varlen.
    Tokens in the dimension 1 of more than three, (B, j, N, D), are a batch of dense calls over N.

    Returns o like query, and with return_lse also lse, jagged (B, H, j).
    """
    check_jagged(query, key, value)
    if query._ragged_idx == 1 and query.ndim > 3:
        return _dense_rows(
            dense, query, key, value, times=times, return_lse=return_lse, **of_pairs, **words
        )
    for name, given in of_pairs.items():
        if given is not None:
            raise ValueError(
                f"{name}: got one with jagged tensors, expected None: they hold no padding"
            )
    if times is not None:
        if not is_jagged(times) or not same_sequences(times, query):
            raise ValueError("times: expected a jagged tensor (B, j) with the sequences of query")
        times = tokens_of(times).values
    q, k = tokens_of(query), tokens_of(key)
    v = tokens_of(value).values
    heads = query.ndim == 4
    o, lse = packed(
        *(x if heads else x[:, None] for x in (q.values, k.values, v)),
        q.cu_seqlens,
        k.cu_seqlens,
        q.max_seqlen,
        k.max_seqlen,
        times=times,
        return_lse=True,
        **words,
    )
    o = jagged_like(o if heads else o[:, 0], q, query, query._ragged_idx)
    if not return_lse:
        return o
    lse = lse.transpose(0, 1)
    return o, jagged_like(lse if heads else lse[:, 0], q, query, query._ragged_idx)


def _dense_rows(dense: Any, query: Any, key: Any, value: Any, **words: Any) -> Any:
    """Attention of each row of jagged (B, j, ..., N, D) by itself, as in torch."""
    if not same_sequences(query, key):
        raise ValueError("key: got sequences of other lengths than those of query")
    tokens = tokens_of(query), tokens_of(key), tokens_of(value)
    outputs = dense(*(x.values for x in tokens), **words)
    if not isinstance(outputs, tuple):
        return jagged_like(outputs, tokens[0], query, 1)
    return tuple(jagged_like(x, tokens[0], query, 1) for x in outputs)
