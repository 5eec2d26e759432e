"""The calls of training that stages of run.py repeat, capture and watch, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn import fused_attention, fused_attention_varlen

Call = Callable[..., Tensor]
LENGTHS, DRYRUN_LENGTHS = (577, 0, 200, 1), (12, 1)
DRYRUN_CALLS = ("full", "timeline", "dropout", "packed dropout")
MODEL_WIDTH = 768  # heads times head_dim of a base encoder: part of the strides, so of the kernels


class TrainingCall(NamedTuple):
    """call(q, k, v, **keywords), and its gradient for do."""

    name: str
    call: Call
    qkvd: list[Tensor]
    keywords: dict[str, Any]

    def forward(self) -> list[Tensor]:
        """[o]"""
        with torch.no_grad():
            return [self.call(*self.qkvd[:3], **self.keywords)]

    def both(self) -> list[Tensor]:
        """[o, dq, dk, dv, ...]"""
        return gradients(self.call, *self.qkvd, **self.keywords)


def inputs(
    device: torch.device | str, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[Tensor]:
    """q, k, v and do."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def gradients(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, **keywords: Any
) -> list[Tensor]:
    """[o, dq, dk, dv], and the gradients of keywords that need one"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = call(q, k, v, **keywords)
    more = [x for x in keywords.values() if isinstance(x, Tensor) and x.requires_grad]
    return [o.detach(), *torch.autograd.grad(o, (q, k, v, *more), do)]


def training_calls(
    backend: str,
    device: torch.device | str,
    sequences: tuple[int, ...],
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Iterator[TrainingCall]:
    """Dense, windowed, masked, with every feature and its gradient, and packed."""
    n, heads = sequences[0], MODEL_WIDTH // dim if dim > 16 else 1
    lengths = torch.tensor(sequences)
    keys = (torch.arange(n) < lengths[:, None].clamp(min=1)).to(device)[:, None, None]
    bias = torch.linspace(-2, 2, n * n, device=device, dtype=dtype).view(1, 1, n, n)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device)
    known = {"q_lengths": lengths.to(device), "kv_lengths": lengths.to(device)}
    steps = torch.arange(n, device=device).expand(len(sequences), n)
    by_head = torch.linspace(0.01, 0.5, heads, device=device).requires_grad_()
    relative = torch.linspace(-1, 1, heads * 17, device=device).view(heads, 17)
    terms = {
        "alibi_slopes": by_head,
        "relative_bias": relative.requires_grad_(),
        "softcap": 20.0,
    }
    timeline = {
        "segment_ids": steps // 100,
        "times": steps * 0.5,
        "time_window": 40.0,
        "time_decay": by_head,
        "global_prefix": 3,
    }
    dense: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"is_causal": True},
        "window": {"window": 100},
        "key mask": {"attn_mask": keys},
        "key mask window": {"attn_mask": keys, "window": 100},
        "bias": {"attn_mask": bias.requires_grad_()},
        "lengths": known,
        "lengths window": {**known, "window": 100},
        "dropout": {"dropout_p": 0.1},
        "terms": terms,
        "timeline": timeline,
    }
    x = inputs(device, len(sequences), heads, n, dim, dtype=dtype, seed=seed)
    for name, keywords in dense.items():
        yield TrainingCall(name, fused_attention, x, {"backend": backend, **keywords})
    bounds = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": n, "max_seqlen_k": n}
    packed: dict[str, dict[str, Any]] = {
        "packed": {},
        "packed causal": {"is_causal": True},
        "packed window": {"window": 100},
        "packed dropout": {"dropout_p": 0.1},
    }
    x = inputs(device, sum(sequences), heads, dim, dtype=dtype, seed=seed)
    for name, keywords in packed.items():
        yield TrainingCall(
            name, fused_attention_varlen, x, {"backend": backend, **bounds, **keywords}
        )


def calls_of_stage(
    backend: str, device: torch.device, dryrun: bool, seed: int = 0
) -> Iterator[TrainingCall]:
    """At the size at which stages in this process run them."""
    lengths, dim = (LENGTHS, 64) if not dryrun else (DRYRUN_LENGTHS, 16)
    calls = training_calls(backend, device, lengths, dim, seed=seed)
    return (call for call in calls if not dryrun or call.name in DRYRUN_CALLS)
