"""flash-attn's arguments, checked and turned into those of clinattn."""

from __future__ import annotations

import contextlib
import reprlib
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from clinattn.operator.words.checks import check_on, check_tensor
from clinattn.operator.words.scalars import as_flag, as_float, as_int, pair_of

DENSE = "(batch, seqlen, heads, head_dim)"
PACKED = "(total_tokens, heads, head_dim)"
PAGED = "(blocks, block_size, heads, head_dim)"
MOST_SPLITS = 128  # of flash-attn's kernels


def check_layout(name: str, x: Any, layout: str) -> None:
    """Checks that x is a tensor of the rank of layout."""
    check_tensor(name, x)
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {layout}")


def check_qkv(q: Any, k: Any, v: Any, layout: str) -> None:
    """Checks ranks, batch, heads, head_dim and devices; fused_attention checks dtypes."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_layout(name, x, layout)
    check_heads(q, k)
    for name, x in (("k", k), ("v", v)):
        check_on(name, x, q.device, "q")
    if k.shape != v.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}")
    if layout == DENSE and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: got batch size {k.shape[0]}, expected that of q, {q.shape[0]}")


def check_heads(q: Tensor, k: Tensor) -> None:
    heads, head_dim = q.shape[-2:]
    if k.shape[-1] != head_dim:
        raise ValueError(f"k: got head_dim {k.shape[-1]}, expected that of q, {head_dim}")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(f"k: got {k.shape[-2]} heads, expected a divisor of the {heads} of q")


def unpacked(name: str, x: Any, parts: int, layout: str) -> tuple[Tensor, ...]:
    """The parts of x, which has one more dimension than layout, before the heads; views."""
    batch, rest = layout.split(", heads")
    layout = f"{batch}, {parts}, heads{rest}"
    check_layout(name, x, layout)
    if x.shape[-3] != parts:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {layout}")
    return x.unbind(-3)


def band(causal: Any, window_size: Any) -> tuple[int | None, int | None]:
    """(left, right) of causal and window_size, None for no bound: any negative side is none."""
    pair = pair_of(window_size)
    try:
        if pair is None:
            raise TypeError
        left, right = (as_int("window_size", side) for side in pair)
    except TypeError:
        raise TypeError(
            f"window_size: got {reprlib.repr(window_size)}, expected (left, right), integers, -1 "
            "for no bound"
        ) from None
    return bound(left), 0 if as_flag("causal", causal) else bound(right)


def bound(side: int) -> int | None:
    return None if side < 0 else side


def check_softcap(softcap: Any) -> float | None:
    """The softcap as a float, or None for 0."""
    softcap = as_float("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap: got {softcap}, expected a number > 0, or 0.0 for none")
    return softcap or None


def check_num_splits(num_splits: Any) -> None:
    """Checks how many parts of the keys were asked for, below 1 for any; it changes no bit here."""
    if as_int("num_splits", num_splits) > MOST_SPLITS:
        raise ValueError(f"num_splits: got {num_splits}, expected at most {MOST_SPLITS}")


def keywords(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """Arguments that fused_attention and fused_attention_varlen share."""
    return {
        "dropout_p": dropout_p,
        "scale": None if softmax_scale is None else as_float("softmax_scale", softmax_scale),
        "window": band(causal, window_size),
        "bottom_right": True,
        "softcap": check_softcap(softcap),
        "alibi_slopes": alibi_slopes,
        "enable_gqa": True,
        "return_lse": True,
    }


def as_given(x: Tensor) -> Any:
    """A context without autocast: flash-attn computes in the dtype of its inputs."""
    kind = x.device.type
    if is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
