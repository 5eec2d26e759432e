"""flash_attn_with_kvcache: a step of decoding over a cache that grows in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.integrations.flash_attn.cache import Cache, checked_cache
from clinattn.integrations.flash_attn.paged import check_used
from clinattn.integrations.flash_attn.words import (
    DENSE,
    as_given,
    band,
    check_num_splits,
    check_qkv,
    keywords,
)
from clinattn.operator import split
from clinattn.operator.attention import fused_attention
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_dense, check_lengths, check_scale, check_tensor
from clinattn.operator.words.feature_checks import check_per_head, check_softcap
from clinattn.operator.words.scalars import as_flag, as_int


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q over a cache, to which k and v, if given, are appended first, in place.

    q: (batch, seqlen_q, heads, head_dim). k_cache, v_cache: (batch_cache, seqlen_cache, heads_k,
    head_dim), or with block_table, int32 (batch, blocks), pages (blocks, block_size, heads_k,
    head_dim), which are gathered. k, v: (batch, seqlen_new, heads_k, head_dim), written from
    cache_seqlens on, (batch,) int32 or one int: how many tokens the cache has; default all.
    cache_batch_idx: (batch,), the cache's row of each sequence; default the first rows.
    cache_leftpad: (batch,), where each row's first token is; default 0.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2), at least as long as the cache; k turns at
    its place in the cache, q at its own with causal or a window, else all of q at cache_seqlens.
    rotary_interleaved: pairs are (0, 1), (2, 3), ...; else (i, i + rotary_dim / 2).
    num_splits: in how many parts to take the keys, at most 128 and below 1 for any; results have
    the same bits for every number. The rest as in flash_attn_func.

    Returns out as q, and with return_softmax_lse also lse (batch, heads, seqlen_q). Has no
    backward pass: raises NotImplementedError for inputs that require a gradient.
    """
    given = (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, alibi_slopes)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
        raise NotImplementedError(
            "flash_attn_with_kvcache: got inputs that require a gradient, which it does not have; "
            "call it under torch.no_grad()"
        )
    words = keywords(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    cache = checked_cache(q, k_cache, v_cache, cache_batch_idx, block_table)
    _check_words(q, cache, words)
    new = _check_new(q, k, v, cache_seqlens, cache)
    lengths = _check_seqlens(q, cache_seqlens, cache.capacity - new)
    if block_table is not None:
        check_used(block_table, lengths + new, k_cache)
    visible = None
    if cache_leftpad is not None:
        leftpad = check_lengths("cache_leftpad", cache_leftpad, len(q), cache.capacity, q.device)
        keys = torch.arange(cache.capacity, device=q.device)
        visible = (keys >= leftpad[:, None])[:, None, None]
    tables = _check_rotary(q, k, rotary_cos, rotary_sin, cache.capacity)
    in_order = band(causal, window_size) != (None, None)
    if tables is not None and in_order:
        _check_places(tables[0], lengths, q.shape[1])
    rotary_interleaved = as_flag("rotary_interleaved", rotary_interleaved)
    return_softmax_lse = as_flag("return_softmax_lse", return_softmax_lse)
    check_num_splits(num_splits)
    split.refuse("flash_attn_with_kvcache")
    with torch.no_grad(), as_given(q):
        if k is not None and v is not None:
            places = _places(lengths, new)
            if tables is not None:
                k = _turned(k, places, *tables, rotary_interleaved)
                places_q = _places(lengths, q.shape[1] if in_order else 1)
                q = _turned(q, places_q, *tables, rotary_interleaved)
            cache.write(places, k, v)
        keys, values = cache.read()
        o, lse = fused_attention(
            q.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=visible,
            kv_lengths=lengths + new,
            **words,
        )
    out = o.transpose(1, 2).contiguous()
    return (out, lse) if return_softmax_lse else out


def _check_words(q: Tensor, cache: Cache, words: dict[str, Any]) -> None:
    """Refuses the arguments that fused_attention would refuse, before the cache is written."""
    heads, head_dim = q.shape[2:]
    query, key, value = (x[:0].transpose(1, 2) for x in (q, cache.k, cache.v))
    check_dense(query, key, value, True)
    check_scale(words["scale"], head_dim, q.dtype)
    check_softcap(words["softcap"], q.dtype)
    if words["alibi_slopes"] is not None:
        shapes = (heads,), (len(q), heads)
        check_per_head("alibi_slopes", words["alibi_slopes"], q, *shapes, dtype=torch.float32)


def _check_new(q: Tensor, k: Any, v: Any, cache_seqlens: Any, cache: Cache) -> int:
    """Checks k and v; returns the number of tokens to append."""
    if k is None and v is None:
        return 0
    if k is None or v is None:
        raise ValueError("k and v: got one of them, expected both or neither")
    check_qkv(q, k, v, DENSE)
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: got None with k and v, expected where to write them")
    if k.shape[2] != cache.k.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} heads, expected the cache's {cache.k.shape[2]}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"k and v: got {k.dtype} and {v.dtype}, expected that of q, {q.dtype}")
    if k.shape[1] > cache.capacity:
        raise ValueError(
            f"k: got {k.shape[1]} tokens, expected at most the cache's {cache.capacity}"
        )
    return k.shape[1]


def _check_seqlens(q: Tensor, cache_seqlens: Any, limit: int) -> Tensor:
    """cache_seqlens as (batch,) int32, at most limit, which leaves room for what is appended."""
    if cache_seqlens is None:
        cache_seqlens = limit
    if isinstance(cache_seqlens, Tensor) and cache_seqlens.dim() > 0:
        return check_lengths("cache_seqlens", cache_seqlens, len(q), limit, q.device)
    length = as_int("cache_seqlens", cache_seqlens, "an int or a torch.Tensor (batch,)")
    if not 0 <= length <= limit:
        raise ValueError(f"cache_seqlens: got {length}, expected 0 to {limit}")
    return torch.full((len(q),), length, dtype=torch.int32, device=q.device)


def _check_rotary(
    q: Tensor, k: Any, cos: Any, sin: Any, capacity: int
) -> tuple[Tensor, Tensor] | None:
    """Checks tables, at least as long as the cache, in which appended keys have their places."""
    if cos is None and sin is None:
        return None
    if k is None:
        raise ValueError("rotary_cos: got one without k and v, expected keys to append")
    check_tensor("rotary_cos", cos)
    check_tensor("rotary_sin", sin)
    if cos.shape != sin.shape or not (cos.is_floating_point() and sin.is_floating_point()):
        raise ValueError(
            f"rotary_cos and rotary_sin: got {cos.dtype} {tuple(cos.shape)} and {sin.dtype} "
            f"{tuple(sin.shape)}, expected floating tables of one shape"
        )
    if cos.device != q.device or sin.device != q.device:
        raise ValueError(
            f"rotary_cos and rotary_sin: got devices {cos.device} and {sin.device}, expected that "
            f"of q, {q.device}"
        )
    if cos.dim() != 2 or not 1 <= cos.shape[1] <= q.shape[-1] // 2 or len(cos) < capacity:
        raise ValueError(
            f"rotary_cos: got shape {tuple(cos.shape)}, expected (positions, rotary_dim / 2) with "
            f"at least {capacity} positions and a rotary_dim up to {q.shape[-1]}"
        )
    return cos, sin


def _check_places(table: Tensor, lengths: Tensor, n_queries: int) -> None:
    """Checks for the last query's row if lengths can be read; else places are cut to the table."""
    if not concrete(lengths) or len(lengths) == 0:
        return
    needed = int(lengths.max()) + n_queries
    if len(table) < needed:
        raise ValueError(
            f"rotary_cos: got {len(table)} positions, expected at least {needed} for {n_queries} "
            f"queries after {int(lengths.max())} tokens of the cache"
        )


def _places(lengths: Tensor, n: int) -> Tensor:
    """(batch, n) int64: the places in the cache of the n tokens after the first lengths."""
    return lengths[:, None].long() + torch.arange(n, device=lengths.device)


def _turned(x: Tensor, places: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (batch, n, heads, head_dim) with the first rotary_dim features turned; fp32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    places = places.clamp(max=cos.shape[0] - 1)
    cos, sin = (table[places][:, :, None].to(dtype) for table in (cos, sin))
    turning, rest = x.tensor_split([2 * cos.shape[-1]], -1)
    turning = turning.to(dtype)
    first, second = (
        (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    )
    turned = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined.to(x.dtype), rest), -1)
