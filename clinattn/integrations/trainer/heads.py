"""Heads that read one vector of a row, given one of each sequence of a packed row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clinattn.integrations.trainer.split import ENDS

Pool = Callable[[Tensor, Tensor], Tensor]


def first_tokens(hidden: Tensor, ends: Tensor) -> Tensor:
    """(S, 1, E), the first token of each sequence of a row (1, T, E)."""
    return hidden[0].index_select(0, ends[:-1].long())[:, None]


def means(hidden: Tensor, ends: Tensor) -> Tensor:
    """(S, 1, E), the mean of the tokens of each sequence of a row (1, T, E)."""
    return torch.segment_reduce(hidden[0], "mean", offsets=ends.long(), axis=0)[:, None]


class PooledApart:
    """Hooks by which a head gets vectors (S, 1, E) in place of a packed row (1, T, E).

    base: the encoder below the head. With a pooler, which reads the first token of what it is
    given, its input changes; otherwise the last hidden state that the encoder returns does. Rows
    that are not packed stay as they are.
    """

    def __init__(self, base: nn.Module, pool: Pool):
        self.pool = pool
        self.ends: Tensor | None = None
        pooler = getattr(base, "pooler", None)
        self.handles: list[RemovableHandle] = [
            base.register_forward_pre_hook(self._remember, with_kwargs=True),
            base.register_forward_hook(self._replace)
            if pooler is None
            else pooler.register_forward_pre_hook(self._give),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _remember(self, module: nn.Module, args: Any, words: dict[str, Any]) -> None:
        self.ends = words.get(ENDS)

    def _give(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self.ends is None else (self.pool(args[0], self.ends), *args[1:])

    def _replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.ends is None:
            return None
        if isinstance(output, tuple):
            return (self.pool(output[0], self.ends), *output[1:])
        output["last_hidden_state"] = self.pool(output["last_hidden_state"], self.ends)
        return output
