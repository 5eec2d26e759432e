"""Every form that torch's scaled_dot_product_attention takes, as (batch, heads, tokens, head_dim).

There, all dimensions before the last two broadcast, as in torch.matmul, and enable_gqa repeats the
heads of key and value. Here, what broadcasts is a view without strides, and heads that query heads
share are read where they lie.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor


class DenseForm(NamedTuple):
    """query (B, H, Nq, D), key and value (B, Hkv, Nk, .), the mask for them; leading: (..., H)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    leading: tuple[int, ...]

    def refuse(self, **words: Any) -> None:
        """Raises ValueError for arguments per sequence or head where dimensions are left out."""
        for name, given in words.items():
            if given is not None and len(self.leading) < 2:
                raise ValueError(
                    f"{name}: got one with {len(self.leading) + 2} dimensions of query, key and "
                    "value, expected (batch, heads, tokens, head_dim)"
                )

    def as_given(self, x: Tensor, dim: int) -> Tensor:
        """Returns a result (B, H, Nq, ...) with the dimensions that were given before dim."""
        return x.reshape(*self.leading, *x.shape[dim:])


def is_dense(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool) -> bool:
    """Returns whether query, key and value have four dimensions of which none broadcasts."""
    if not len(q) == len(k) == len(v) == 4:
        return False
    heads_fit = k[1] == q[1] or enable_gqa or 1 not in (q[1], k[1])
    return q[0] == k[0] == v[0] and k[1] == v[1] and heads_fit


def dense_form(query: Tensor, key: Tensor, value: Tensor, mask: Any, enable_gqa: bool) -> DenseForm:
    """Raises ValueError where the shapes do not broadcast."""
    given = query, key, value
    for name, x in zip(("query", "key", "value"), given, strict=True):
        if x.dim() < 2:
            _refuse(name, x, "at least (tokens, head_dim)")
    if value.shape[-2] != key.shape[-2]:
        _refuse("value", value, f"the {key.shape[-2]} tokens of key")
    rank = max(x.dim() for x in given)
    q, k, v = (_to_rank(x, max(rank, 4)) for x in given)
    batch = _broadcast("key", key, q.shape[:-3], k.shape[:-3])
    batch = _broadcast("value", value, batch, v.shape[:-3])
    heads = q.shape[-3]
    if not enable_gqa:
        (heads,) = _broadcast("key", key, (heads,), (k.shape[-3],), hint=True)
        (heads,) = _broadcast("value", value, (heads,), (v.shape[-3],), hint=True)
    q, k, v = (_flat(x, batch) for x in (q, k, v))
    q = q.expand(-1, heads, -1, -1)
    if k.shape[1] != v.shape[1]:
        k, v = _with_heads("key", k, heads), _with_heads("value", v, heads)
    if isinstance(mask, Tensor) and rank > 4 and mask.dim() > 3:
        if mask.dim() > rank:
            _refuse("attn_mask", mask, f"at most {rank} dimensions")
        mask = _to_rank(mask, rank)
        _broadcast("attn_mask", mask, (*batch, heads, *_pairs(query, key)), mask.shape)
        shared = math.prod(mask.shape[:-3]) == 1
        mask = mask.flatten(0, -4) if shared else _flat(mask, batch)
    leading = (*batch, heads)[-(rank - 2) :] if rank > 2 else ()
    return DenseForm(q, k, v, mask, leading)


def _pairs(query: Tensor, key: Tensor) -> tuple[int, int]:
    return query.shape[-2], key.shape[-2]


def _to_rank(x: Tensor, rank: int) -> Tensor:
    return x[(None,) * (rank - x.dim())]


def _flat(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """(..., H, N, D), whose first dimensions broadcast to batch, as (prod(batch), H, N, D)."""
    x = x.expand(*batch, *x.shape[-3:])
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-3:])


def _with_heads(name: str, x: Tensor, heads: int) -> Tensor:
    """Repeats the heads of x (B, H, N, D); a copy only where there are several to repeat."""
    count = x.shape[1]
    if count == 1 or count == heads:
        return x.expand(-1, heads, -1, -1)
    if count == 0 or heads % count:
        _refuse(name, x, f"a divisor of the {heads} heads of query")
    return x.repeat_interleave(heads // count, 1)


def _broadcast(
    name: str, x: Tensor, to: tuple[int, ...], sizes: tuple[int, ...], hint: bool = False
) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(to, sizes))
    except RuntimeError:
        more = "; enable_gqa=True lets groups of query heads share one" if hint else ""
        _refuse(name, x, f"one that broadcasts: {tuple(sizes)} to {tuple(to)}{more}")


def _refuse(name: str, x: Tensor, expected: str) -> NoReturn:
    raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
