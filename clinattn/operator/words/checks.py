"""Checks of public arguments. A message names the argument, what was given and expected.

Values of lengths and cu_seqlens are looked at where that costs no wait: on the CPU, not traced.
On a GPU the kernels clamp them into range instead, so that none ever reads out of bounds.
"""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any, NoReturn

import torch
from torch import Tensor

from clinattn.backends.select import DTYPES, NAMES
from clinattn.operator.visibility import Window, concrete
from clinattn.operator.words.forms import is_dense
from clinattn.operator.words.scalars import as_float, as_int, at_most_far, limits, pair_of

SERVED_DTYPES = DTYPES["reference"]


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_tensor(name: str, x: Any) -> None:
    """Checks that x is a tensor whose numbers lie in memory by strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.is_nested:
        raise TypeError(
            f"{name}: got a nested tensor, expected a dense one; fused_attention takes jagged ones "
            "for query, key and value together"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {x.layout}, expected torch.strided")
    if x.is_quantized:
        raise TypeError(f"{name}: got {x.dtype}, expected a tensor that is not quantized")


def check_on(name: str, x: Any, device: torch.device, like: str = "query") -> None:
    """Checks that x is a tensor on the device of the others."""
    check_tensor(name, x)
    if x.device != device:
        raise ValueError(f"{name}: got device {x.device}, expected that of {like}, {device}")


def check_tensors(query: Any, key: Any, value: Any) -> None:
    check_tensor("query", query)
    check_tensor("key", key)
    check_tensor("value", value)


def check_dense(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Checks query (B, H, Nq, D); key and value (B, Hkv, Nk, D or Dv)."""
    if not has_checked_form(query, key, value, enable_gqa):
        raise ValueError(
            f"query, key and value: got shapes {_shape(query)}, {_shape(key)} and {_shape(value)}, "
            "expected (batch, heads, tokens, head_dim) with one batch size, and one number of "
            "heads for key and value"
        )


def has_checked_form(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Checks tensors as check_dense does, but returns False for shapes of another form.

    Of those only type and device are checked.
    """
    _check_kind(query, key, value)
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == 4 and q == k == v and q[3] > 0:  # most calls, and nothing more to ask
        return True
    if not is_dense(q, k, v, enable_gqa):
        return False
    if k != v:
        _check_values(key, value)
    _check_heads(q[1], k[1], q[3], k[3], enable_gqa)
    return True


def check_packed(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Checks query (Tq, H, D); key and value (Tk, Hkv, D or Dv)."""
    _check_kind(query, key, value)
    q, k = query.shape, key.shape
    if len(q) != 3:
        _raise_rank("query", query, "(total_tokens, heads, head_dim)")
    if len(k) != 3:
        _raise_rank("key", key, "(total_tokens, heads, head_dim)")
    if k != value.shape:
        _check_values(key, value)
    _check_heads(q[1], k[1], q[2], k[2], enable_gqa)


def _check_kind(query: Tensor, key: Tensor, value: Tensor) -> None:
    dtype, device = query.dtype, query.device
    if dtype not in SERVED_DTYPES:
        served = ", ".join(map(str, SERVED_DTYPES))
        raise TypeError(f"query: got {dtype}, expected one of {served}")
    if key.dtype != dtype or value.dtype != dtype:
        raise TypeError(
            f"query, key and value: got {dtype}, {key.dtype} and {value.dtype}, expected one dtype"
        )
    if key.device != device or value.device != device:
        raise ValueError(
            f"query, key and value: got devices {device}, {key.device} and {value.device}, "
            "expected one device"
        )


def _check_values(key: Tensor, value: Tensor) -> None:
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"value: got shape {_shape(value)}, expected that of key, {_shape(key)}, but for the "
            "last dimension"
        )
    if value.shape[-1] == 0:
        raise ValueError(f"value: got shape {_shape(value)}, expected a head_dim of at least 1")


def _raise_rank(name: str, x: Tensor, layout: str) -> NoReturn:
    raise ValueError(
        f"{name}: got shape {_shape(x)} with {x.dim()} dimensions, "
        f"expected {layout.count(',') + 1}: {layout}"
    )


def _check_heads(heads: int, kv_heads: int, dim: int, kv_dim: int, enable_gqa: bool) -> None:
    if dim != kv_dim:
        raise ValueError(f"key: got head_dim {kv_dim}, expected that of query, {dim}")
    if dim == 0:
        raise ValueError("query: got head_dim 0, expected at least 1")
    if heads == kv_heads:
        return
    if not enable_gqa:
        raise ValueError(
            f"key: got {kv_heads} heads, expected the {heads} of query; "
            "enable_gqa=True lets groups of query heads share one"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"key: got {kv_heads} heads, expected a divisor of the {heads} heads of query"
        )


def check_backend(backend: Any) -> str:
    if backend is None:
        return ""
    if not isinstance(backend, str) or backend not in NAMES:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(NAMES)}")
    return backend


def check_scale(scale: Any, head_dim: int, dtype: torch.dtype) -> float:
    """The factor of the scores, D ** -0.5 unless given; finite in base 2, as kernels take it."""
    if scale is None:
        return head_dim**-0.5
    scale = as_float("scale", scale)
    limit = math.log(2) * limits(dtype).max
    if not -limit <= scale <= limit:
        raise ValueError(f"scale: got {scale}, expected a number from {-limit:.4g} to {limit:.4g}")
    return scale


def check_window(window: Any) -> Window:
    """Returns None, or (left, right) with None for no bound and none beyond all tokens."""
    if window is None:
        return None
    pair = pair_of(window)
    try:
        sides = [
            None if side is None else as_int("window", side)
            for side in (pair if pair is not None else (window, window))
        ]
    except TypeError:
        raise TypeError(
            f"window: got {reprlib.repr(window)}, expected an int or (left, right), each an int or "
            "None"
        ) from None
    if any(side is not None and side < 0 for side in sides):
        raise ValueError(
            f"window: got {reprlib.repr(window)}, expected sides >= 0, or None for no bound"
        )
    left, right = (None if side is None else at_most_far(side) for side in sides)
    return left, right


def check_mask(attn_mask: Any, shape: tuple[int, int, int, int], device: torch.device) -> None:
    """Checks that attn_mask broadcasts to (B, H, Nq, Nk), and is bool or floating point."""
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        raise TypeError(
            f"attn_mask: got {attn_mask.dtype}, expected torch.bool (True = visible) or a "
            "floating dtype (added to the scores)"
        )
    if attn_mask.device != device:
        raise ValueError(
            f"attn_mask: got device {attn_mask.device}, expected that of query, {device}"
        )
    given = attn_mask.shape
    fits = len(given) <= 4 and all(
        size == 1 or size == full
        for size, full in zip(reversed(given), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask: got shape {_shape(attn_mask)}, expected one that broadcasts to {shape}"
        )


def check_lengths(name: str, lengths: Any, batch: int, limit: int, device: torch.device) -> Tensor:
    """Checks lengths (B,) of any integer dtype, from 0 to `limit`; returns int32."""
    check_tensor(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {lengths.dtype}, expected torch.int32 or torch.int64")
    if lengths.device != device:
        raise ValueError(f"{name}: got device {lengths.device}, expected that of query, {device}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: got shape {_shape(lengths)}, expected ({batch},)")
    if batch > 0 and concrete(lengths):
        low, high = (x.item() for x in torch.aminmax(lengths))
        if low < 0 or high > limit:
            raise ValueError(f"{name}: got values from {low} to {high}, expected 0 to {limit}")
    return lengths.to(torch.int32).contiguous()


def check_cu_seqlens(
    side: str, cu_seqlens: Any, max_seqlen: Any, total: int, device: torch.device
) -> int:
    """int32 (S + 1,), from 0 up to at most `total`, never decreasing; returns max_seqlen."""
    if max_seqlen is not None:
        max_seqlen = as_int(f"max_seqlen_{side}", max_seqlen)
        if max_seqlen < 0:
            raise ValueError(f"max_seqlen_{side}: got {max_seqlen}, expected at least 0")
        max_seqlen = at_most_far(max_seqlen)
    name = f"cu_seqlens_{side}"
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: got {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.device != device:
        raise ValueError(
            f"{name}: got device {cu_seqlens.device}, expected that of query, {device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{name}: got shape {_shape(cu_seqlens)}, expected (number of sequences + 1,)"
        )
    if not concrete(cu_seqlens):
        return max_seqlen if max_seqlen is not None else _longest(cu_seqlens, total)
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name}: got a first value of {ends[0]}, expected 0")
    lengths = list(map(operator.sub, ends[1:], ends))
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{name}: got {ends[at]} followed by {ends[at + 1]}, expected no decrease")
    if ends[-1] > total:
        raise ValueError(f"{name}: got a last value of {ends[-1]}, expected at most {total} tokens")
    longest = max(lengths, default=0)
    if max_seqlen is None:
        return longest
    if max_seqlen < longest:
        raise ValueError(
            f"max_seqlen_{side}: got {max_seqlen}, expected at least the longest, {longest}"
        )
    return max_seqlen


def _longest(cu_seqlens: Tensor, total: int) -> int:
    """The longest sequence, at the price of a wait for the device; where traced, a bound."""
    traced = torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor
    if traced or cu_seqlens.shape[0] == 1:
        return total
    return int(cu_seqlens.diff().max())
