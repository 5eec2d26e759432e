"""Packed batches for trainers that exist: transformers' Trainer, accelerate, Lightning, a loop.

    clinattn.replace_attention(model)
    trainer = clinattn.integrations.trainer.PackedTrainer(model, args, max_tokens=16384, ...)

or, for other trainers, a DataLoader of three parts:

    sampler = TokenBudgetSampler(lengths_of(dataset), max_tokens=16384)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=PackingCollator(model))

With Lightning, or with no trainer at all, PackedDataLoader takes the place of DataLoader. Results
come back by per_sequence. PackedTrainer, and PackedBatches for a Trainer of your own, need
transformers and accelerate.
"""

from typing import Any

from clinattn.integrations.trainer.collator import PackingCollator
from clinattn.integrations.trainer.lengths import lengths_of
from clinattn.integrations.trainer.loader import PackedDataLoader
from clinattn.integrations.trainer.sampler import TokenBudgetSampler
from clinattn.integrations.trainer.split import per_sequence

__all__ = [
    "PackedBatches",
    "PackedDataLoader",
    "PackedTrainer",
    "PackingCollator",
    "TokenBudgetSampler",
    "lengths_of",
    "per_sequence",
]


def __getattr__(name: str) -> Any:
    if name in ("PackedBatches", "PackedTrainer"):
        from clinattn.integrations.trainer import packed_trainer

        return getattr(packed_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
