"""131,072 tokens over four processes: results, bytes and memory; a module to import."""

from __future__ import annotations

from typing import Any

import torch
from alive import Alive
from torch import Tensor

from clinattn import context_parallel, fused_attention
from clinattn.parallel import gather, shard
from clinattn.parallel.processes import Processes

HEADS, HEAD_DIM, WINDOW = 1, 32, 64
KINDS = {"windowed": {"window": WINDOW}, "global": {}}
SHORT, LONG = 8_192, 131_072


def inputs(tokens: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    shape = (1, HEADS, tokens, HEAD_DIM)
    return {name: torch.randn(shape, generator=random) for name in ("q", "k", "v", "do")}


def results(given: dict[str, Tensor], words: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (given[name].detach().requires_grad_() for name in "qkv")
    o, lse = fused_attention(q, k, v, return_lse=True, **words)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), given["do"])
    return {"o": o.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def split_long(mesh: Any, kind: str, tokens: int) -> dict[str, Tensor]:
    given = {name: shard(mesh, x, 2) for name, x in inputs(tokens).items()}
    with context_parallel(mesh):
        found = results(given, KINDS[kind])
    return {name: gather(mesh, x, 2) for name, x in found.items()}


def measured(mesh: Any) -> dict[str, tuple[list[list[int]], int]]:
    """By kind: the bytes sent, by message, in each exchange; and the most that were alive."""
    start, sent = Processes.start, []

    def counting(processes: Processes, sends: Any, receives: Any) -> Any:
        sent.append([x.numel() * x.element_size() for _, x in sends])
        return start(processes, sends, receives)

    Processes.start = counting
    found = {}
    for kind, words in KINDS.items():
        given = {name: shard(mesh, x, 2).clone() for name, x in inputs(SHORT).items()}
        sent.clear()
        with context_parallel(mesh), Alive(*given.values()) as alive:
            results(given, words)
        found[kind] = list(sent), alive.peak
    return found
