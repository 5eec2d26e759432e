"""Data and sequence parallel at once, over a mesh of two by two processes; a module to import."""

from __future__ import annotations

from typing import Any

import torch
from split_models import ENDS, HEADS, IDS, LABELS
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clinattn import context_parallel
from clinattn.parallel import shard

# Two batches, one for each row of the mesh.
BATCHES = [(IDS, LABELS), (IDS.flip(0), LABELS.flip(0))]
WAYS = ("ddp", "fsdp")


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(ids, cu_seqlens=ENDS, labels=labels).loss


def whole(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients of the mean loss of both batches, in one process."""
    model = HEADS["masked"]().to(dtype)
    sum(loss_of(model, *batch) / 2 for batch in BATCHES).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients(mesh: Any) -> dict[str, dict[str, Tensor]]:
    found = {}
    for way in WAYS:
        model = HEADS["masked"]()
        if way == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            everyone = mesh._flatten("everyone")
            for block in model.encoder.layers:
                fully_shard(block, mesh=everyone)
            wrapped = fully_shard(model, mesh=everyone)
        ids, labels = BATCHES[mesh.get_local_rank("data")]
        tokens = mesh["sequence"]
        with context_parallel(tokens):
            loss_of(wrapped, shard(tokens, ids), shard(tokens, labels)).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found[way] = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return found
