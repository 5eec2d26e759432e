"""Engines that train a model on its ranks: alone, whole on each (DDP), or in shards (FSDP2).

The engines of several ranks are torch's. They add gradients up over the ranks and take no mean: the
loop divides once, by the labels of all ranks.
"""

# no annotations from __future__: DDP reads those of its hook
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import take_weights
from .clock import Clock, Mark

BUCKET_MB = 25  # of gradients in a message of DDP: torch's default


class Engine:
    """A model on one process, and what the engines of several do in their own way.

    model: whose parameters an optimiser takes, on its device. trained: what is called to train it.
    """

    def __init__(self, model: nn.Module, device: torch.device, clock: Clock):
        self.model = model.to(device)
        self.trained: nn.Module = model
        self.clock = clock

    def rehearse(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """Before the first step: the loss of any batch, always the same one, if that is of use."""

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of each batch of a step. last: of this rank's batches."""
        return nullcontext()

    def computed(self) -> Mark | None:
        """The moment at which this rank had its gradients of the step; None where nothing tells."""
        return self.clock.mark()

    def clip(self, largest: float) -> float:
        """Scales the gradient down to the norm `largest`, 0 for no limit; returns its norm."""
        norm = self._norm([p.grad for p in self.model.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(self.model.parameters(), largest or math.inf, norm)
        return float(norm)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def finite(self) -> bool:
        """Returns whether every weight that this rank holds is finite."""
        return all(bool(weight.isfinite().all()) for weight in self.model.parameters())

    def forwards(self, own: int, most: int) -> int:
        """Returns how many times this rank has to call the model where it has `own` batches.

        most: the largest `own` of any rank.
        """
        return own

    def weights(self) -> dict[str, Tensor]:
        """Returns the whole model's weights by name; all ranks call it, rank 0 has the result."""
        return self.model.state_dict()

    def moments(
        self, path: Path, optimiser: torch.optim.Optimizer, weights: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Returns what a checkpoint at `path` holds of the optimiser; all ranks call it.

        weights: what `weights` returned.
        """
        return {"optimiser": optimiser.state_dict()}

    def take(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Loads the weights of a whole model. Raises ValueError where names or shapes differ."""
        take_weights(self.model, weights, where)

    def take_moments(
        self, path: Path, saved: dict[str, Any], optimiser: torch.optim.Optimizer
    ) -> None:
        """Loads the optimiser of a checkpoint at `path`, whichever engine has saved it."""
        if "shards" in saved:
            from .shards import load_shards  # it takes seconds to import

            load_shards(path, self.model, optimiser)
        else:
            self._take_whole(saved["optimiser"], optimiser)

    def _take_whole(self, state: dict[str, Any], optimiser: torch.optim.Optimizer) -> None:
        optimiser.load_state_dict(state)


@dataclass
class Reductions:
    """The sums of gradients over the ranks, bucket by bucket; `last` marks when one was started.

    Not a part of the engine: DDP holds it where the garbage collector does not look.
    """

    clock: Clock
    last: Mark | None = None

    def start(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.last = self.clock.mark()
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])


class Replicated(Engine):
    """The whole model on every rank; gradients are summed while others are still computed."""

    def __init__(self, model: nn.Module, device: torch.device, clock: Clock):
        super().__init__(model, device, clock)
        self.reductions = Reductions(clock)
        self.ddp = DistributedDataParallel(
            model, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True
        )
        self.ddp.register_comm_hook(self.reductions, Reductions.start)
        self.trained = self.ddp

    def rehearse(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """DDP fills its buckets anew after its first backward pass, by the order of gradients.

        Sums of more than two ranks round by their place in a bucket: buckets are the same in the
        first step of a run, and of one that goes on, only if they are settled before.
        """
        loss(self.trained).backward()
        self.model.zero_grad()

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.ddp.no_sync()

    def computed(self) -> Mark | None:
        return self.reductions.last
