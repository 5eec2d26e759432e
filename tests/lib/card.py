"""A device that stands in for a card: tensors in the CPU's memory that say they are on "meta".

    with StandInCard():
        torch.ones(2, device="meta") + torch.ones(2)  # RuntimeError: two devices, as on a card

It shows where a program mixes devices, on a machine without one. Kernels of this package cannot run
there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CARD = torch.device("meta")
# Indices may lie on the CPU.
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class OnCard(Tensor):
    """A tensor on the device: sizes and dtype of a CPU tensor, which holds the numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnCard:
        kept = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        size_and_type = {"size": numbers.shape, "dtype": numbers.dtype, "device": CARD}
        self = Tensor._make_wrapper_subclass(cls, **size_and_type, **kept)
        self.numbers = numbers
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_card(func, args, kwargs or {})


class StandInCard(TorchDispatchMode):
    """Takes device="meta" for the stand-in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_card(func, args, kwargs or {})


def on_card(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    asked = kwargs.get("device")
    inputs = [x for x in tensors if isinstance(x, OnCard)]
    name = func._schema.name.split("::")[1]
    moves = name in ("_to_copy", "copy_", "_copy_from")
    others = [x for x in tensors if not isinstance(x, OnCard) and x.dim()]
    if name in INDEXING:
        others = others[:1] if not isinstance(args[0], OnCard) else []
    if inputs and others and not moves:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found at least two "
            f"devices, {CARD} and cpu!"
        )
    result_on_card = bool(inputs) if asked is None else torch.device(asked).type == CARD.type
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, OnCard) else x, (args, kwargs))
    result = func(*args, **kwargs)
    if not result_on_card:
        return result
    known = {id(x.numbers): x for x in inputs}  # what is written in place stays the same tensor

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OnCard(x)

    return tree_map(wrapped, result)
