"""Whole models over a sequence split over processes, and in one process.

A module of its own, because the processes of tests/parallel/processes import it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from encoders import CONFIGS, MODERN, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clinattn import context_parallel
from clinattn.encoder import CausalLanguageModel, MaskedLanguageModel, SequenceClassifier
from clinattn.parallel import shard

ENDS = torch.tensor((0, 17, 17, 18, 81, 121), dtype=torch.int32)
TOKENS = int(ENDS[-1])
CONFIG = replace(MODERN, max_positions=TOKENS)
RANDOM = torch.Generator().manual_seed(2)
IDS = torch.randint(0, MODERN.vocab_size, (TOKENS,), generator=RANDOM)
# Labels lie towards the end, so that processes have different numbers of them.
LABELS = IDS.where((torch.rand(TOKENS, generator=RANDOM) * TOKENS).lt(torch.arange(TOKENS)), -100)
DAYS = torch.rand(TOKENS, generator=RANDOM, dtype=torch.float64).cumsum(0) * 3 + 15_000
CLASSES = torch.tensor((0, 1, 2, 1, 0))
HEADS: dict[str, Callable[[], nn.Module]] = {
    "masked": lambda: seeded(MaskedLanguageModel, CONFIG),
    "masked-bert": lambda: seeded(MaskedLanguageModel, replace(CONFIGS["bert"], max_positions=128)),
    "masked-prefix": lambda: seeded(
        MaskedLanguageModel, replace(CONFIGS["global_prefix"], max_positions=128)
    ),
    "causal": lambda: seeded(CausalLanguageModel, replace(CONFIGS["causal"], max_positions=128)),
    "by-days": lambda: seeded(MaskedLanguageModel, replace(CONFIG, positions="rotary_time")),
    "first": lambda: seeded(SequenceClassifier, CONFIG, 3),
    "mean": lambda: seeded(SequenceClassifier, replace(CONFIG, pooling="mean"), 3),
    "last": lambda: seeded(SequenceClassifier, replace(CONFIG, pooling="last"), 3),
}


def loss_of(name: str, model: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of a process that has this part of the tokens."""
    more = {"positions": part(DAYS)} if name == "by-days" else {}
    labels = CLASSES if name in ("first", "mean", "last") else part(LABELS)
    return model(part(IDS), cu_seqlens=ENDS, labels=labels, **more).loss


def whole(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss and gradients of one process."""
    model = HEADS[name]().to(dtype)
    loss = loss_of(name, model, lambda x: x)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def split_models(mesh: Any) -> dict[str, dict[str, Tensor]]:
    """The mean of the processes' losses and its gradients, by model."""
    found = {}
    for name in HEADS:
        model = DistributedDataParallel(HEADS[name](), process_group=mesh.get_group())
        with context_parallel(mesh):
            loss = loss_of(name, model, lambda x: shard(mesh, x))
            loss.backward()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean, group=mesh.get_group())
        found[name] = {"loss": mean / mesh.size()}
        found[name] |= {n: p.grad for n, p in model.module.named_parameters()}
    return found
