"""A decoder as ETHOS-ARES builds it: `with sdpa():` gives its 2,048 causal tokens clinattn.

Its layers call torch's scaled_dot_product_attention and are not changed. A tiny one learns a rule.
"""

import torch
from torch import nn

from clinattn.integrations.sdpa import sdpa


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        linear = lambda n, m: nn.Linear(n, m, bias=False)
        self.heads, self.qkv, self.out = heads, linear(width, 3 * width), linear(width, width)
        self.norm, self.mlp_norm = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width))

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        o = nn.functional.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 32), Block(32, 4), Block(32, 4), nn.Linear(32, 40))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    timeline = torch.arange(2049) ** 2 % 40  # codes that come again
    for step in range(31):
        with sdpa():
            loss = nn.functional.cross_entropy(model(timeline[None, :-1])[0], timeline[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss:.3f}")
