"""The processes of a mesh dimension, and what they send each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Message = tuple[int, Tensor]  # the other process, and what is sent or received


class Processes:
    """Processes 0, 1, ... of a one-dimensional mesh; `rank` is this one.

    Raises TypeError for what is no DeviceMesh, ValueError for one of several dimensions.
    """

    def __init__(self, mesh: DeviceMesh):
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: got {type(mesh).__name__}, expected a DeviceMesh")
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh: got dimensions {mesh.mesh_dim_names or tuple(mesh.shape)}, expected one: "
                "that of the processes which share a sequence, as mesh['sequence']"
            )
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def said(self, words: Any) -> list[Any]:
        """Returns the words of every process, which are pickled."""
        words_of: list[Any] = [None] * self.size
        dist.all_gather_object(words_of, words, self.group)
        return words_of

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Sends contiguous tensors and receives into others, in their order, until `wait`."""
        ops = [
            dist.P2POp(op, x, group=self.group, group_peer=peer)
            for op, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, x in messages
        ]
        works = dist.batch_isend_irecv(ops) if ops else []
        return Pending(works, [x for _, x in sends])

    def summed(self, x: Tensor) -> Tensor:
        """Returns the sum over all processes, the same bits in each; x is overwritten."""
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """Returns the largest over all processes, element by element; x is overwritten."""
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def gathered(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """Returns the parts of all processes, sizes[rank] along dim each, one after the other."""
        most = max(sizes)
        mine = x.detach().movedim(dim, 0)
        padded = mine.new_zeros((most, *mine.shape[1:]))
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, self.group)
        whole = torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])
        return whole.movedim(0, dim)


class Pending:
    """Messages under way; what is sent is kept until then."""

    def __init__(self, works: Sequence[Any], kept: Sequence[Tensor]):
        self._works, self._kept = works, kept

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._kept = (), ()
