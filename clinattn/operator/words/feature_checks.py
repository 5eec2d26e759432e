"""Checks of public arguments: dropout, segments, times, biases, softcap and prefix.

Values are looked at where that costs no wait, as in checks: on the CPU, not traced. On a GPU, times
or segments out of order give results without meaning, but read nothing out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clinattn.operator.timeline import Rows, first_disorder
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_on
from clinattn.operator.words.scalars import as_float, as_int, at_most_far, limits

TIME_DTYPES = (torch.float32, torch.float64, torch.int64)


def _check_shape(name: str, x: Tensor, *expected: tuple[int, ...]) -> None:
    if tuple(x.shape) not in expected:
        wanted = " or ".join(map(str, expected))
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {wanted}")


def check_dropout(dropout_p: Any) -> float:
    dropout_p = as_float("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability from 0 to 1")
    return dropout_p


def check_softcap(softcap: Any, dtype: torch.dtype) -> float:
    """Returns 0 for none; else the softcap, moved off the ends of the range of the arithmetic.

    At the ends s / softcap would be infinite, or subnormal and lose digits; no score
    shows the move.
    """
    if softcap is None:
        return 0.0
    softcap = as_float("softcap", softcap, "a float or None")
    scores = limits(dtype)
    least = scores.tiny * scores.eps  # subnormal
    if not least / 2 < softcap <= scores.max:
        raise ValueError(
            f"softcap: got {softcap}, expected a number > 0, or None for none, from "
            f"{least:.4g} to {scores.max:.4g} where scores are {scores.dtype}"
        )
    return min(max(softcap, scores.tiny * 2.0**26), scores.max * 2.0**-18)


def check_global_prefix(global_prefix: Any, n_keys: int | None) -> int:
    global_prefix = as_int("global_prefix", global_prefix)
    if global_prefix < 0:
        raise ValueError(f"global_prefix: got {global_prefix}, expected >= 0")
    if n_keys is not None and global_prefix > n_keys:
        raise ValueError(f"global_prefix: got {global_prefix}, expected at most the {n_keys} keys")
    return at_most_far(global_prefix)


# The scalars of a call that are not just any float.
_CHECKS: dict[str, Callable[[Any, torch.dtype, int | None], Any]] = {
    "softcap": lambda x, dtype, _: check_softcap(x, dtype),
    "global_prefix": lambda x, _, n_keys: check_global_prefix(x, n_keys),
    "dropout_p": lambda x, *_: check_dropout(x),
}


def check_scalars(
    given: Mapping[str, Any], dtype: torch.dtype, n_keys: int | None
) -> dict[str, Any]:
    """Checks FEATURE_SCALARS by name, those without a check of their own as floats.

    n_keys: the most that global_prefix may be, None for no bound. Returns fields of Arguments.
    """
    return {
        name: _CHECKS[name](x, dtype, n_keys) if name in _CHECKS else as_float(name, x)
        for name, x in given.items()
    }


def check_per_head(
    name: str, x: Any, query: Tensor, *shapes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A floating tensor of one of the shapes, in the dtype of lse; keeps its gradient."""
    check_on(name, x, query.device)
    if not x.is_floating_point():
        raise TypeError(f"{name}: got {x.dtype}, expected a floating dtype")
    _check_shape(name, x, *shapes)
    return x.to(dtype).contiguous()


def check_relative(x: Any, query: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    check_on("relative_bias", x, query.device)
    if x.dim() != 2 or x.shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias: got shape {tuple(x.shape)}, expected (heads, 2 L + 1), "
            "one number for each distance from -L to L"
        )
    return check_per_head("relative_bias", x, query, (heads, x.shape[1]), dtype=dtype)


def check_self_attention(name: str, queries: Any, keys: Any, same_sequences: bool = True) -> None:
    """Checks that one list, segment_ids or times, can hold for queries and keys."""
    if queries != keys or not same_sequences:
        raise ValueError(
            f"{name}: got {queries} queries and {keys} keys"
            f"{'' if same_sequences else ' in other sequences'}, expected as many of one as of "
            "the other: it holds for both"
        )


def check_segment_ids(segment_ids: Any, query: Tensor, shape: tuple[int, int]) -> None:
    check_on("segment_ids", segment_ids, query.device)
    if segment_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"segment_ids: got {segment_ids.dtype}, expected torch.int32 or int64")
    _check_shape("segment_ids", segment_ids, shape)


def check_times(times: Any, query: Tensor, shape: tuple[int, ...]) -> None:
    check_on("times", times, query.device)
    if times.dtype not in TIME_DTYPES:
        served = ", ".join(map(str, TIME_DTYPES))
        raise TypeError(f"times: got {times.dtype}, expected one of {served}")
    _check_shape("times", times, shape)
    if times.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("times: has no gradient; pass times.detach()")


def check_time_words(times: Any, time_window: Any, time_decay: Any) -> float | None:
    """Checks that times come with what uses them, and only then; returns time_window."""
    for name, value in (("time_window", time_window), ("time_decay", time_decay)):
        if value is not None and times is None:
            raise ValueError(f"{name}: got a value without times, expected times, too")
    if times is not None and time_window is None and time_decay is None:
        raise ValueError("times: got times alone, expected time_window or time_decay, too")
    if time_window is None:
        return None
    time_window = as_float("time_window", time_window)
    if not time_window >= 0:
        raise ValueError(f"time_window: got {time_window}, expected >= 0, in the unit of times")
    # No difference in fp32 is larger.
    return math.inf if time_window > torch.finfo(torch.float32).max else time_window


def check_order(name: str, values: Tensor, rows: Rows) -> None:
    """Checks that values are finite and never decrease among the tokens that are not padding."""
    if not (concrete(values) and concrete(rows.last)):
        return
    row = "sequence" if values.dim() == 1 else "row"
    if values.is_floating_point():
        wrong = (rows.valid & ~values.isfinite()).flatten().nonzero()
        if len(wrong):
            at = int(wrong[0])
            place = at - int(rows.first.flatten()[at])
            raise ValueError(
                f"{name}: {row} {int(rows.sequence.flatten()[at])} is {values.flatten()[at]} at "
                f"{place}, expected finite times"
            )
    disorder = first_disorder(values, rows)
    if disorder is not None:
        at_row, place, before, value = disorder
        raise ValueError(
            f"{name}: {row} {at_row} decreases at {place}, from {before} to {value}; "
            "expected no decrease"
        )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Returns whether two int tensors agree, as far as can be read without a wait."""
    return a.shape == b.shape and not (concrete(a) and concrete(b) and not torch.equal(a, b))
