"""A DataLoader that gives each process its batches and can be resumed within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from clinattn.integrations.trainer.sampler import TokenBudgetSampler, this_process


class PackedDataLoader(DataLoader):
    """torch's DataLoader over a TokenBudgetSampler, for Lightning and loops of your own.

    dataset, collate_fn and other words: those of DataLoader. batch_sampler: a TokenBudgetSampler.

    Each process of torch.distributed gets its share; Lightning leaves it alone, whatever
    use_distributed_sampler says, and accelerate takes the sampler and shares it out itself.
    state_dict() counts the batches that were given out, not those that workers read ahead, and
    load_state_dict() goes on behind them. Raises TypeError for another sampler.
    """

    def __init__(self, dataset: Any, *, batch_sampler: TokenBudgetSampler, **words: Any):
        # Lightning's predict wraps the sampler, to note which sequences it gave out.
        sampler = getattr(batch_sampler, "_batch_sampler", batch_sampler)
        if not isinstance(sampler, TokenBudgetSampler):
            raise TypeError(
                f"batch_sampler: got {type(batch_sampler).__name__}, expected a TokenBudgetSampler"
            )
        if sampler is not batch_sampler and sampler.num_replicas > 1:
            raise NotImplementedError(
                "predict of Lightning over packed rows is for one process; expected devices=1, "
                "or PackedTrainer.predict"
            )
        super().__init__(dataset, batch_sampler=batch_sampler, **words)
        self.budget = sampler
        self._given = 0  # batches of this epoch
        self._resumed: tuple[int, int] | None = None  # epoch, batches before
        # Lightning asks here whether somebody shares out the data already.
        vars(self)["sampler"] = _Shared(sampler)

    @property
    def _index_sampler(self) -> Any:
        return _Share(self.batch_sampler, self.budget.num_replicas, self._first())

    def _first(self) -> int:
        epoch, first = self._resumed or (None, 0)
        return first if epoch == self.budget.epoch else 0

    def __len__(self) -> int:
        """The batches of this process in an epoch."""
        return len(self.budget) // self.budget.num_replicas

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._given = self._first()
        for batch in super().__iter__():
            self._resumed = None
            self._given += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.budget.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch and what the order depends on."""
        return {"epoch": self.budget.epoch, "batches": self._given, **self.budget.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batches that were given out; ValueError for a state of other data."""
        for name, x in self.budget.fingerprint().items():
            if state[name] != x:
                raise ValueError(
                    f"{name}: the state was saved with {state[name]!r}, and this loader has {x!r}; "
                    "expected the same data, budget, seed and number of processes"
                )
        epoch, given = state["epoch"], state["batches"]
        if given >= len(self):
            epoch, given = epoch + 1, 0
        self.budget.set_epoch(epoch)
        self._resumed, self._given = (epoch, given), given


class _Share:
    """The batches of this process, from number `first` on."""

    def __init__(self, batches: Any, num_replicas: int, first: int):
        self.batches, self.num_replicas, self.first = batches, num_replicas, first

    def __len__(self) -> int:
        return len(self.batches) // self.num_replicas - self.first

    def __iter__(self) -> Iterator[list[int]]:
        n = self.num_replicas
        rank = this_process() if n > 1 else 0
        return islice(iter(self.batches), self.first * n + rank, None, n)


class _Shared(DistributedSampler):
    """Tells Lightning that data are shared out, and passes its set_epoch on."""

    def __init__(self, sampler: TokenBudgetSampler):
        self.batches = sampler

    def __len__(self) -> int:
        return len(self.batches.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)
