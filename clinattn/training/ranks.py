"""The processes of a run under torchrun; one process alone is a group of one."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Before there is a group: its functions default to the group of that moment, and torch._dynamo,
# part of an optimiser's first step, imports it. A group held there outlives destroy_process_group,
# and its threads let go of tensors while the interpreter ends, which aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

Found = TypeVar("Found")


class RanksLost(RuntimeError):
    """Another process of the run has ended, or cannot be reached. first: no other has said so."""

    def __init__(self, first: bool):
        super().__init__("another process of this run has ended, or cannot be reached")
        self.first = first


class FirstFailed(RuntimeError):
    """Rank 0 has raised an error, and says what it is."""


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
        """The largest x of any rank, in place, element by element."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def gather(self, x: Any) -> list[Any]:
        """List of each rank's x, on all ranks."""
        if self.world == 1:
            return [x]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, x)
        return found

    def by_first(self, work: Callable[[], Found]) -> Found:
        """Lets rank 0 work, and returns its result on all ranks.

        An error is raised on rank 0 as it is, and as FirstFailed on the others.
        """
        found: list[Any] = [None, None]  # what it finds, or what its error says
        failed: Exception | None = None
        if self.rank == 0:
            try:
                found[0] = work()
            except Exception as error:
                failed, found[1] = error, str(error)
        if self.world > 1:
            dist.broadcast_object_list(found)
        if failed is not None:
            raise failed
        if found[1] is not None:
            raise FirstFailed(found[1])
        return found[0]


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """The group that torchrun's environment describes, and this rank's device.

    Raises RanksLost from within where the other ranks are lost.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, torch.device(device)
        return
    chosen = torch.device(device)
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    store = _store(world)
    backend, rank = "nccl" if device == "cuda" else "gloo", int(os.environ["RANK"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Ranks(rank, world), chosen
    except RuntimeError as error:
        if of_lost_ranks(error):
            ignore_end_of_job()
            raise RanksLost(_is_first(store)) from error
        raise
    finally:
        gc.collect()  # DDP holds the group
        dist.destroy_process_group()


def _store(world: int) -> dist.Store:
    """The store of torchrun's agent, which outlives the ranks, or one that rank 0 keeps."""
    ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=ours and os.environ["RANK"] == "0",
    )
    return dist.PrefixStore(f"clinattn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_first(store: dist.Store) -> bool:
    """Returns whether no other rank has asked before; True where the store is lost, too."""
    try:
        return store.add("lost", 1) == 1
    except RuntimeError:
        return True


def ignore_end_of_job() -> None:
    """Lets a process that is about to end say why: torchrun sends SIGTERM to what is left."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def of_lost_ranks(error: RuntimeError) -> bool:
    """Returns whether a collective failed; gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def restarted() -> bool:
    """Returns whether torchrun or Slurm has started this run anew after a failure."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)
