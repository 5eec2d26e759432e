"""A transformer built as FEMR (CLMBR, MOTOR) builds it; its attention is an argument.

After som-shahlab/femr, src/femr/models/transformer.py and config.py: the patients of a batch are
packed into one row, attention is causal, local and within a patient, q and k turn by age in days,
and one linear layer makes q, k, v and the hidden features of the block. The defaults are FEMR's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clinattn.integrations.xformers import BlockDiagonalMask

Attention = Callable[[Tensor, Tensor, Tensor, object], Tensor]


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 3072
    heads: int = 12
    layers: int = 6
    attention_width: int = 496


def scores_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias) -> Tensor:
    """FEMR's attention on CPUs: scores of every pair, in fp32. q, k, v: (1, N, heads, D)."""
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    bias = attn_bias.materialize((*q.shape[:3], k.shape[2]), torch.float32, q.device)
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias, -1)
    return (weights @ v).transpose(1, 2)


def turns(ages: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(sin, cos) (N, 1, dim) of ages in days; frequencies go from 1 to 10000 ** -2."""
    frequencies = 10000 ** -torch.linspace(0, 2, dim // 2)
    angles = (ages[:, None] * frequencies).repeat_interleave(2, -1)[:, None]
    return angles.sin(), angles.cos()


def turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x (N, heads, D), whose features 2 i and 2 i + 1 are a pair."""
    other = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + other * sin


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-6)
        inner = shape.intermediate_size
        self.input_proj = nn.Linear(shape.hidden_size, inner + 3 * shape.hidden_size)
        self.output_proj = nn.Linear(shape.hidden_size + inner, shape.hidden_size)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor, bias, attention: Attention) -> Tensor:
        features, qkv = self.input_proj(self.norm(x)).split(
            (self.shape.intermediate_size, 3 * self.shape.hidden_size), -1
        )
        q, k, v = qkv.reshape(len(x), 3, self.shape.heads, -1).unbind(1)
        q, k = turned(q, sin, cos), turned(k, sin, cos)
        attended = attention(q[None], k[None], v[None], bias).reshape(x.shape)
        return self.output_proj(torch.cat((attended, F.gelu(features)), -1))


class Transformer(nn.Module):
    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.shape, self.attention = shape, attention
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.in_norm = nn.RMSNorm(shape.hidden_size, eps=1e-6)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.out_norm = nn.RMSNorm(shape.hidden_size, eps=1e-6)

    def forward(self, tokens: Tensor, ages: Tensor, lengths: Sequence[int]) -> Tensor:
        """tokens (N,), ages (N,) in days, lengths of the patients -> (N, hidden_size)."""
        x = self.in_norm(self.embed(tokens))
        sin, cos = turns(ages, self.shape.hidden_size // self.shape.heads)
        bias = BlockDiagonalMask.from_seqlens(lengths)
        bias = bias.make_local_attention(self.shape.attention_width)
        for block in self.blocks:
            x = x + block(x, sin.to(x.dtype), cos.to(x.dtype), bias, self.attention)
        return self.out_norm(x)


def patients(lengths: Sequence[int], vocab_size: int) -> tuple[Tensor, Tensor]:
    """(tokens, ages): random codes, and days that begin at an age of up to 80 years and rise."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=random)
    ages = [
        80 * 365 * torch.rand(1, generator=random)
        + (30 * torch.rand(n, generator=random)).floor().cumsum(0)
        for n in lengths
    ]
    return tokens, torch.cat(ages)
