"""The split of sequences over processes that a block has entered, if any.

Code that means whole sequences reads `active`: attention, rotary origins, layouts of an encoder.
The state is the process's, not the thread's: recomputed layers run in threads of autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Part(NamedTuple):
    """The tokens [begin, end) of each row that this process has, of `total`."""

    begin: int
    end: int
    total: int


class Split(Protocol):
    @property
    def processes(self) -> int: ...

    @property
    def dense(self) -> Callable[..., Any]:
        """Computes fused_attention of this process's tokens: query, key, value and all words."""

    @property
    def packed(self) -> Callable[..., Any]:
        """Computes fused_attention_varlen of this process's tokens, in the same way."""

    def part(self, tokens: int) -> Part:
        """Returns the place of this process's tokens; all processes ask for it together."""

    def check(self, x: Tensor, wrong: Callable[[], str | None]) -> None:
        """Raises ValueError in all processes where one says what is wrong with its part x.

        Each tensor is asked about once.
        """

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """Returns the whole of what has a part along dim in each process; without a gradient."""

    def summed(self, x: Tensor) -> Tensor:
        """Returns the sum over processes. Gradients are summed as well."""


active: Split | None = None


def refuse(what: str) -> None:
    """Raises NotImplementedError where sequences are split, which `what` knows nothing of."""
    if active is not None:
        raise NotImplementedError(
            f"{what}: not served inside context_parallel, where it would see the part of this "
            "process for the whole sequence"
        )
