"""A mask that is a pattern: complete for whoever reads it, O(N) in memory until then.

Copies keep the pattern, on another device too, in a pickle or as the detached input of reentrant
checkpointing. Any other operation gets the (B, 1, Nq, Nk) numbers that the pattern stands for, and
one that makes a view or writes leaves the mask complete: what is written counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clinattn.operator.visibility import PreparedMask, prepare_mask


class Pattern(NamedTuple):
    """Query i sees the keys j with -left <= j - (i + offset) <= right, of its own segment.

    None on a side is no bound. segment_ids: (B, N), or None. padded: some keys may be hidden.
    prepared: the mask of the keys as all layers can take it, but for a compiler.
    """

    left: int | None = None
    right: int | None = None
    offset: int = 0
    segment_ids: Tensor | None = None
    padded: bool = False
    prepared: PreparedMask | None = None

    def band(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        """(Nq, Nk) bool, what the two sides leave visible."""
        ahead = torch.arange(n_keys, device=device) - self.offset
        ahead = ahead - torch.arange(n_queries, device=device)[:, None]
        inside = torch.ones_like(ahead, dtype=torch.bool)
        if self.left is not None:
            inside &= ahead >= -self.left
        if self.right is not None:
            inside &= ahead <= self.right
        return inside


class PatternMask(Tensor):
    """bool (B, 1, Nq, Nk), True = visible, of keys (B, 1, 1, Nk) and a pattern.

    segment_ids: those of the pattern, which a compiler looks for here. complete: the numbers, once
    somebody holds a view of them; the pattern is of no account then.
    """

    keys: Tensor
    segment_ids: Tensor | None
    sides: tuple[int | None, int | None, int, bool]
    prepared: PreparedMask | None
    complete: Tensor | None

    @staticmethod
    def __new__(cls, keys: Tensor, n_queries: int, pattern: Pattern) -> PatternMask:
        shape = (keys.shape[0], 1, n_queries, keys.shape[3])
        with torch.inference_mode(False):  # else torch cannot detach one made outside
            return Tensor._make_wrapper_subclass(
                cls, shape, dtype=torch.bool, device=keys.device
            )

    def __init__(self, keys: Tensor, n_queries: int, pattern: Pattern) -> None:
        self.keys, self.segment_ids = keys, pattern.segment_ids
        self.sides = (pattern.left, pattern.right, pattern.offset, pattern.padded)
        self.prepared, self.complete = pattern.prepared, None

    @property
    def pattern(self) -> Pattern:
        left, right, offset, padded = self.sides
        return Pattern(left, right, offset, self.segment_ids, padded, self.prepared)

    def dense(self) -> Tensor:
        """The mask as a plain tensor."""
        if self.complete is not None:
            return self.complete
        visible = self.keys & self.pattern.band(self.shape[2], self.shape[3], self.device)
        if self.segment_ids is not None:
            ids = self.segment_ids
            visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
        return visible

    def copied(self, copy: Callable[[Tensor], Tensor]) -> PatternMask:
        keys = copy(self.keys)
        ids = None if self.segment_ids is None else copy(self.segment_ids)
        pattern = self.pattern._replace(segment_ids=ids, prepared=None)
        return made(keys, self.shape[2], *pattern[:5])

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PatternMask({self.dense()!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.complete is not None:
            return self.complete.__reduce_ex__(protocol)
        return made, (self.keys, self.shape[2], *self.pattern[:5])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    # Methods by which torch.compile takes a mask as an input and makes it anew.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ("keys", "segment_ids", "complete")
        return [name for name in names if getattr(self, name) is not None], self.sides

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], sides: Any, outer_size: Any, outer_stride: Any
    ) -> PatternMask:
        left, right, offset, padded = sides
        pattern = Pattern(left, right, offset, inner.get("segment_ids"), padded)
        mask = PatternMask(inner["keys"], outer_size[2], pattern)
        mask.complete = inner.get("complete")
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if (
            func in COPIES
            and isinstance(first, PatternMask)
            and first.complete is None
            and kwargs.get("dtype") in (None, torch.bool)
        ):
            # A memory format is that of all numbers, which the parts do not have.
            words = {n: x for n, x in kwargs.items() if n not in ("dtype", "memory_format")}
            return first.copied(lambda x: func(x, *args[1:], **words))
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if isinstance(x, PatternMask) and argument.alias_info is not None:
                x.complete = x.dense()
        return func(
            *tree_map_only(PatternMask, PatternMask.dense, args),
            **tree_map_only(PatternMask, PatternMask.dense, kwargs),
        )


_ATEN = torch.ops.aten
COPIES = (
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.detach.default,
    _ATEN.lift_fresh.default,
    _ATEN._pin_memory.default,
    _ATEN._to_copy.default,
)


def made(
    keys: Tensor,
    n_queries: int,
    left: int | None,
    right: int | None,
    offset: int,
    segment_ids: Tensor | None,
    padded: bool,
) -> PatternMask:
    """Returns a mask of these parts, prepared for all layers."""
    pattern = Pattern(left, right, offset, segment_ids, padded)
    if padded and not torch.compiler.is_compiling():
        prepared = prepare_mask(keys, keys.shape[0], keys.shape[3], torch.float32)
        pattern = pattern._replace(prepared=prepared)
    return PatternMask(keys, n_queries, pattern)
