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
        q, k, v = (y[mask.bool()].unflatten(-1, (self.heads, -1)).bfloat16()
                   for y in (turned(q, times), turned(k, times), v))  # fmt: skip
        ends = nn.functional.pad(mask, (0, 1)).flatten().cumsum(0)[(mask[0] == 0).nonzero()[:, 0]]
        ends = nn.functional.pad(ends, (1, 0)).int()
        n = int(ends.diff().max())
        o = flash_attn_varlen_func(q, k, v, ends, ends, n, n, causal=True).flatten(1).to(x.dtype)
        return self.out(torch.zeros_like(x).masked_scatter(mask.bool()[..., None], o))


if __name__ == "__main__":
    mask = torch.cat([torch.ones(1, 300), torch.zeros(1, 1), torch.ones(1, 90), torch.zeros(1, 1)], 1)
    times = (torch.rand(mask.shape) * 30).cumsum(1)  # days
    x = torch.randn(*mask.shape, 64, requires_grad=True)
    PackedAttention()(x, mask, times)[0, 301:391].square().sum().backward()
    print(f"gradient of the other patient: {x.grad[0, :300].abs().max():.0f}")
