"""The most bytes of tensors that were alive at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the storages of what is computed inside, until they are freed: .peak, in bytes.

    given: tensors made before, which count from the start.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._seen: set[int] = set()
        self.now = self.peak = 0
        self._add(given)

    def _add(self, results: Any) -> None:
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self._add(results)
        return results
