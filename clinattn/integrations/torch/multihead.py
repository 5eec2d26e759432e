"""torch's multi-head attention, from its inputs to its output, over fused_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clinattn.operator.attention import fused_attention, fused_attention_varlen
from clinattn.operator.jagged import Tokens, is_jagged, jagged_like, tokens_of
from clinattn.operator.visibility import combined, right_padded_lengths
from clinattn.operator.words.checks import check_on
from clinattn.operator.words.scalars import as_flag


class Weights(NamedTuple):
    """Weights of nn.MultiheadAttention, under its names.

    in_proj_weight (3 E, E) projects all three inputs; where it is None, separate has the weights of
    query (E, E), key (E, kdim) and value (E, vdim). bias_k, bias_v (1, 1, E): a key and its value
    that are appended to every sequence.
    """

    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    separate: Sequence[Tensor | None]
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> Weights:
        return cls(
            module.num_heads,
            module.in_proj_weight,
            module.in_proj_bias,
            (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight),
            module.out_proj.weight,
            module.out_proj.bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
        )

    def projections(self) -> Sequence[Any]:
        """The weights of query, key and value."""
        return self.separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)

    @property
    def appended(self) -> int:
        """Number of keys that join those of the input."""
        return (self.bias_k is not None) + bool(self.add_zero_attn)


def module_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """multi_head_attention with the weights of a module, and its dropout in training."""
    return multi_head_attention(
        query,
        key,
        value,
        Weights.of(module),
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        is_causal=is_causal,
        dropout_p=module.dropout if module.training else 0.0,
        batch_first=module.batch_first,
    )


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    batch_first: bool = False,
) -> Tensor:
    """Computes what F.multi_head_attention_forward returns with need_weights=False.

    query: (N, E), or (B, N, E) with batch_first, else (N, B, E); key and value alike; or nested
    tensors, strided or jagged, without masks. key_padding_mask: (B, Nk), or (Nk,) for a single
    sequence; attn_mask: (Nq, Nk) or (B H, Nq, Nk); bool (True = hidden) or floating (added).
    is_causal: attn_mask is known to be the causal mask, and is not read. Nested tensors are causal
    in each sequence then, with or without attn_mask.

    A query all of whose keys are hidden gets out_proj_bias, where torch may return NaN. Raises
    ValueError or TypeError for shapes and types that do not fit.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    is_causal = as_flag("is_causal", is_causal)
    if query.is_nested or key.is_nested or value.is_nested:
        if key_padding_mask is not None or (attn_mask is not None and not is_causal):
            raise ValueError("nested tensors: got a mask, expected none: they hold no padding")
        return _nested(query, key, value, weights, is_causal, dropout_p)
    _check_inputs(query, key, value, weights, batch_first)
    batched = query.dim() == 3
    tokens = 1 if batch_first and batched else 0
    batch = query.shape[1 - tokens] if batched else 1
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask[None]
    if is_causal and attn_mask is None:
        raise ValueError("is_causal: got True without attn_mask, expected the mask that is meant")
    plane = (query.shape[tokens], key.shape[tokens])
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None:
            check_on(name, mask, query.device)
    _check_mask("attn_mask", attn_mask, plane, (batch * weights.num_heads, *plane))
    _check_mask("key_padding_mask", key_padding_mask, (batch, plane[1]))
    q, k, v = _project(query, key, value, weights)
    if not batched:
        q, k, v = q[:, None], k[:, None], v[:, None]
    if is_causal and (key_padding_mask is None or not weights.appended):
        attn_mask = None
    else:
        is_causal = False  # torch hides appended keys under the hint alone, and not with padding
    mask, kv_lengths = _merge(attn_mask, key_padding_mask, batch, weights)
    k, v = _append(k, v, weights, tokens)
    q, k, v = (_heads_first(x, weights.num_heads, tokens) for x in (q, k, v))
    o = fused_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        kv_lengths=kv_lengths,
    )
    o = o.transpose(1, 2) if tokens == 1 else o.permute(2, 0, 1, 3)
    o = F.linear(o.flatten(2), weights.out_proj_weight, weights.out_proj_bias)
    return o if batched else o[:, 0]


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, weights: Weights, batch_first: bool
) -> None:
    like = weights.out_proj_weight
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_on(name, x, like.device, "the weights")
        if x.dtype != like.dtype and not (x.is_floating_point() and autocasts(x)):
            raise TypeError(f"{name}: got {x.dtype}, expected that of the weights, {like.dtype}")
    ranks = (query.dim(), key.dim(), value.dim())
    if ranks not in ((2, 2, 2), (3, 3, 3)):
        raise ValueError(
            f"query, key and value: got {', '.join(map(str, ranks))} dimensions, "
            "expected 3 each, or 2 each without a batch"
        )
    features = [x.shape[1] for x in weights.projections()]
    for name, x, n in zip(("query", "key", "value"), (query, key, value), features, strict=True):
        if x.shape[-1] != n:
            raise ValueError(f"{name}: got {x.shape[-1]} features, expected {n}")
    rows = 0 if batch_first else 1
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"value: got shape {tuple(value.shape)}, expected that of key, {tuple(key.shape)}, but "
            "for the features"
        )
    if query.dim() == 3 and query.shape[rows] != key.shape[rows]:
        raise ValueError(
            f"key: got batch size {key.shape[rows]}, expected that of query, {query.shape[rows]}"
        )


def autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(
            f"{name}: got {mask.dtype}, expected torch.bool (True = hidden) or a floating dtype "
            "(added to the scores)"
        )
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {expected}")


def _project(query: Tensor, key: Tensor, value: Tensor, w: Weights) -> Sequence[Tensor]:
    """q, k, v with E features each, by the same products as torch's."""
    weight, bias = w.in_proj_weight, w.in_proj_bias
    if weight is None or key is not value:
        parts = w.projections()
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given: Any = zip((query, key, value), parts, biases, strict=True)
        return [F.linear(*x) for x in given]
    if query is key:
        return F.linear(query, weight, bias).chunk(3, -1)
    embed_dim = weight.shape[1]
    of_q, of_kv = weight.split([embed_dim, 2 * embed_dim])
    bias_q, bias_kv = (None, None) if bias is None else bias.split([embed_dim, 2 * embed_dim])
    return F.linear(query, of_q, bias_q), *F.linear(key, of_kv, bias_kv).chunk(2, -1)


def _append(k: Tensor, v: Tensor, w: Weights, tokens: int) -> tuple[Tensor, Tensor]:
    """k and v with the keys that every sequence gets."""
    one = list(k.shape)
    one[tokens] = 1
    if w.bias_k is not None and w.bias_v is not None:
        k = torch.cat([k, w.bias_k.expand(one)], tokens)
        v = torch.cat([v, w.bias_v.expand(one)], tokens)
    if w.add_zero_attn:
        k = torch.cat([k, k.new_zeros(one)], tokens)
        v = torch.cat([v, v.new_zeros(one)], tokens)
    return k, v


def _heads_first(x: Tensor, heads: int, tokens: int) -> Tensor:
    """(B, H, N, D), a view."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if tokens == 1 else x.permute(1, 2, 0, 3)


def _merge(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, w: Weights
) -> tuple[Tensor | None, Tensor | None]:
    """(attn_mask, kv_lengths) of fused_attention.

    A mask of (B, Nq, Nk) is made only of one that differs between queries and padding that is not
    seen to be a length.
    """
    hidden = []
    kv_lengths = None
    if attn_mask is not None:
        hidden.append(
            attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, w.num_heads))
        )
    if key_padding_mask is not None:
        if hidden and not w.appended and key_padding_mask.dtype == torch.bool:
            kv_lengths = right_padded_lengths(~key_padding_mask)
        if kv_lengths is None:
            hidden.append(key_padding_mask[:, None, None])
    masks = [~x if x.dtype == torch.bool else x for x in hidden]
    if w.appended:
        masks = [F.pad(x, (0, w.appended), value=float(x.dtype == torch.bool)) for x in masks]
    if len(masks) < 2:
        return (masks[0] if masks else None), kv_lengths
    return combined(*masks), kv_lengths


def _nested(
    query: Tensor, key: Tensor, value: Tensor, w: Weights, is_causal: bool, dropout_p: float
) -> Tensor:
    """multi_head_attention of nested tensors, whose sequences are packed as they lie."""
    if not (query.is_nested and key.is_nested and value.is_nested):
        raise ValueError("query, key and value: got some that are nested, expected all or none")
    if w.appended:
        raise NotImplementedError(
            "nested tensors: got add_bias_kv or add_zero_attn, expected keys of the input alone"
        )
    packed: dict[int, Tokens] = {}
    for x in (query, key, value):
        if id(x) not in packed:
            packed[id(x)] = _packed(x)
    of_q, of_k, of_v = (packed[id(x)] for x in (query, key, value))
    if of_v is not of_k and not torch.equal(of_v.cu_seqlens, of_k.cu_seqlens):
        raise ValueError("value: got lengths other than those of key, expected the same")
    projected = _project(of_q.values, of_k.values, of_v.values, w)
    q, k, v = (x.unflatten(-1, (w.num_heads, -1)) for x in projected)
    ends = (of_q.cu_seqlens, of_k.cu_seqlens, of_q.max_seqlen, of_k.max_seqlen)
    o = fused_attention_varlen(q, k, v, *ends, is_causal=is_causal, dropout_p=dropout_p)
    o = F.linear(o.flatten(1), w.out_proj_weight, w.out_proj_bias)
    if is_jagged(query):
        return jagged_like(o, of_q, query, 1)
    return torch.nested.as_nested_tensor(list(o.split(of_q.cu_seqlens.diff().tolist())))


def _packed(x: Any) -> Tokens:
    """The tokens of a nested tensor (B, j, E)."""
    if is_jagged(x):
        if x.dim() != 3 or x._ragged_idx != 1:
            raise ValueError(
                f"nested tensors: got {x.dim()} dimensions with tokens in {x._ragged_idx}, "
                "expected (batch, tokens, features)"
            )
        return tokens_of(x)
    parts = x.unbind()
    ends = torch.tensor([0, *map(len, parts)], device=x.device).cumsum(0, dtype=torch.int32)
    return Tokens(torch.cat(parts), ends, None, None, sum(map(len, parts)))
