"""Attention as CEHR-GPT builds it: patients packed into a row, an empty place behind each.

Its GPT-2 layers take flash-attn's packed call, in bf16. The import is the one line that changes.
"""

import torch
from torch import nn

from clinattn.integrations.flash_attn import flash_attn_varlen_func  # was: from flash_attn import


def turned(x, times):
    """x (B, N, width) rotated at the times (B, N) of its events, before it is split into heads."""
    angles = times[..., None] / 10_000 ** torch.linspace(0, 2, x.shape[-1] // 2)
    sin, cos = (f(angles).repeat_interleave(2, -1) for f in (torch.sin, torch.cos))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


class PackedAttention(nn.Module):
    def __init__(self, width=64, heads=4):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x, mask, times):
        """mask (1, N): 1 at events, 0 behind each patient's last."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, event = turned(q, times), turned(k, times), mask.bool()
        q, k, v = (y[event].unflatten(-1, (self.heads, -1)).bfloat16() for y in (q, k, v))
        ends = nn.functional.pad(mask.cumsum(1)[~event], (1, 0)).int()
        o = flash_attn_varlen_func(q, k, v, ends, ends, len(q), len(q), causal=True)
        return self.out(torch.zeros_like(x).masked_scatter(event[..., None], o.flatten(1).to(x)))


if __name__ == "__main__":
    mask = torch.ones(1, 392).index_fill(1, torch.tensor([300, 391]), 0)  # 300 and 90 events
    times, x = torch.rand(1, 392).cumsum(1), torch.randn(1, 392, 64, requires_grad=True)  # days
    PackedAttention()(x, mask, times)[0, 301:391].square().sum().backward()
    other, own = (x.grad[0, part].abs().max() for part in (slice(300), slice(301, 391)))
    print(f"gradient in the other patient {other}, in its own {own:.4f}")
