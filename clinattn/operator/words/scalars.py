"""Numbers and flags of a caller: what may be given for an int, a float or a bool, in one place.

numpy's scalars and arrays or tensors without dimensions are what their item() is. A bool is no
number, and nothing that float() would parse or round without a word is a float: a str, a complex.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

FAR = 2**31 - 1  # no two tokens of a sequence are further apart


def _plain(x: Any) -> Any:
    """x, or the Python number that an array without dimensions holds."""
    if isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):  # a compiler knows of no ndim
        return x
    return x.item() if getattr(x, "ndim", None) == 0 and hasattr(x, "item") else x


def as_int(name: str, x: Any, expected: str = "an int") -> int:
    """An int of whatever operator.index takes: ints, numpy's, a tensor of one integer. No bool."""
    if type(x) is int or isinstance(x, torch.SymInt):
        return x  # type: ignore[return-value]
    # older releases of numpy take their bool for an index
    if not isinstance(x, bool) and str(getattr(x, "dtype", None)) not in ("torch.bool", "bool"):
        try:
            return operator.index(x)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name}: got {type(x).__name__}, expected {expected}")


def as_float(name: str, x: Any, expected: str = "a float") -> float:
    """A float, or an int that is not too large for one; of numpy or a tensor, too. No NaN.

    A tensor that requires a gradient is refused: item() would lose the gradient.
    """
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(f"{name}: got a tensor that requires a gradient, expected {expected}")
    x = _plain(x)
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {type(x).__name__}, expected {expected}")
    if x != x:
        raise ValueError(f"{name}: got nan, expected {expected}")
    if isinstance(x, int):
        try:
            return float(x)
        except OverflowError:
            raise ValueError(f"{name}: got an int beyond floats, expected {expected}") from None
    return x  # type: ignore[return-value]


def as_flag(name: str, x: Any) -> bool:
    """A bool, or one of numpy or a tensor of one; 0 and 1 too."""
    if type(x) is bool or isinstance(x, torch.SymBool):
        return x  # type: ignore[return-value]
    plain = _plain(x)
    if isinstance(plain, (bool, int)) and plain in (0, 1):
        return bool(plain)
    raise TypeError(f"{name}: got {type(x).__name__}, expected a bool")


def as_size(name: str, x: Any) -> int:
    """An int that a dimension may have."""
    size = as_int(name, x)
    if not 0 <= size <= FAR:
        raise ValueError(f"{name}: got {size}, expected 0 to {FAR}")
    return size


def at_most_far(x: int) -> int:
    """A distance or length, without what it is beyond all there can be."""
    return FAR if x > FAR else x  # not min(), of which a compiler would make a symbol


def ints_of(name: str, x: Any) -> list[int]:
    """The ints of a list, a 1-D array or another iterable but a str; none below 0."""
    if isinstance(x, (str, bytes, dict)) or not hasattr(x, "__iter__"):
        raise TypeError(f"{name}: got {type(x).__name__}, expected integers")
    if getattr(x, "ndim", 1) != 1:
        raise ValueError(f"{name}: got {x.ndim} dimensions, expected 1")
    values = [as_int(name, y, "integers") for y in x]
    if values and not 0 <= min(values) <= sum(values) <= FAR:
        raise ValueError(
            f"{name}: got {min(values)} and {sum(values)} in all, expected >= 0, at most {FAR}"
        )
    return values


def pair_of(x: Any) -> tuple[Any, Any] | None:
    """Two things in a tuple, list, array or tensor; None if x is no such."""
    if x is None or isinstance(x, (int, torch.SymInt)):  # a compiler knows of no ndim
        return None
    if getattr(x, "ndim", None) == 1 and hasattr(x, "tolist"):
        x = x.tolist()
    return (x[0], x[1]) if isinstance(x, (tuple, list)) and len(x) == 2 else None


def limits(dtype: torch.dtype) -> torch.finfo:
    """Returns the limits of the type that scores of such inputs are computed in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
