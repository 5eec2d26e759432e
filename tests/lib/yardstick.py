"""Truths and errors of plain maths, computed once in a process for every test that needs them.

A result is known by what it is computed from, to the bit, so a test may change a problem as it
likes. Tests of one problem on several backends follow each other (`beside_each_other`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # bench/gpu/ reads this module where there is no pytest
    import pytest

MOST_BYTES = 256 * 2**20
# Parameters of tests that say what computes, and nothing of the problem.
COMPUTING = ("backend", "instruction_set", "sets")

_kept: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
_bytes_kept = 0


def shared(compute: Callable[[], Any], *operands: Any) -> Any:
    """compute(), or what it returned for equal operands; nobody may write into the result.

    operands: all that the result depends on, code apart: tensors, generators of random numbers,
    and what has a repr that tells all of it, also in lists, dicts and dataclasses' __dict__.
    """
    global _bytes_kept
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, (compute.__qualname__, torch.get_num_threads(), operands))
    key = digest.digest()
    if key in _kept:
        _kept.move_to_end(key)
    else:
        result = compute()
        _kept[key] = result, sum(x.numel() * x.element_size() for x in _tensors(result))
        _bytes_kept += _kept[key][1]
        while len(_kept) > 1 and _bytes_kept > MOST_BYTES:
            _, (_, freed) = _kept.popitem(last=False)
            _bytes_kept -= freed
    return _kept[key][0]


def beside_each_other(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests of the same function and problem one after the other, otherwise in their order."""
    groups: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        given = callspec.params if callspec else {}
        problem = [
            (name, x if _is_hashable(x) else callspec.indices[name])
            for name, x in given.items()
            if name not in COMPUTING
        ]
        groups.setdefault((item.path, item.nodeid.split("[")[0], *problem), []).append(item)
    return [item for group in groups.values() for item in group]


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _feed(digest: Any, x: Any) -> None:
    if isinstance(x, Tensor):
        digest.update(str(x.device).encode())
        x = x.detach().cpu()
        # an expanded dimension holds one number: its bytes once
        narrow = x[tuple(slice(None, 1) if step == 0 else slice(None) for step in x.stride())]
        numbers = narrow.clone(memory_format=torch.contiguous_format).reshape(-1)
        digest.update(repr((x.dtype, x.shape, x.stride())).encode())
        digest.update(numbers.view(torch.uint8).numpy().tobytes())
    elif isinstance(x, torch.Generator):
        _feed(digest, x.get_state())
    elif isinstance(x, (tuple, list)):
        digest.update(b"(")
        for y in x:
            _feed(digest, y)
        digest.update(b")")
    elif isinstance(x, dict):
        _feed(digest, list(x.items()))
    elif hasattr(x, "__dict__") and not isinstance(x, type) and not callable(x):
        _feed(digest, (type(x).__name__, vars(x)))
    else:
        digest.update(repr(x).encode() + b",")


def _tensors(x: Any) -> Iterable[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from _tensors(y)
