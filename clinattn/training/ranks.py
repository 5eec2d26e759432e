"""The processes of a run under torchrun; one process alone is a group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Before there is a group: its functions default to the group of that moment, and torch._dynamo,
# part of an optimiser's first step, imports it. A group held there outlives destroy_process_group,
# and its threads let go of tensors while the interpreter ends, which aborts the process.
import torch.distributed.nn.functional
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """x added up over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest x of any rank, in place."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def sum_gradients(self, model: nn.Module) -> None:
        """Sums gradients in one message: they are few, and small beside the cost of computing."""
        if self.world == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in gradients]))
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, x: Any) -> list[Any]:
        """List of each rank's x, on all ranks."""
        if self.world == 1:
            return [x]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, x)
        return found


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """The group that torchrun's environment describes, and this rank's device."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, torch.device(device)
        return
    chosen = torch.device(device)
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world), chosen
    finally:
        dist.destroy_process_group()
