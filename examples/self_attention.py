"""Hand-written self-attention over padded patient timelines: key lengths and real timestamps.

Whether a code came in the week before the last event can be learned from times alone.
"""

import torch
from torch import nn

from clinattn import fused_attention


class TimeAttention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.qkv, self.heads = nn.Linear(width, 3 * width), heads
        self.decay = nn.Parameter(torch.full((heads,), 0.01))  # per day

    def forward(self, x, lengths, times):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        o = fused_attention(q, k, v, kv_lengths=lengths, times=times, time_decay=self.decay)
        return x + o.transpose(1, 2).flatten(2)


torch.manual_seed(0)
embed, attention, head = nn.Embedding(20, 32), TimeAttention(), nn.Linear(32, 2)
parameters = [*embed.parameters(), *attention.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, 0.01)
for step in range(151):
    codes, lengths = torch.randint(20, (64, 24)), torch.randint(4, 25, (64,))
    times, last = (torch.rand(64, 24) * 90).sort(1)[0], lengths - 1  # days
    age = times.gather(1, last[:, None]) - times
    labels = ((codes == 7) & (age >= 0) & (age < 7)).any(1).long()
    hidden = attention(embed(codes), lengths, times)[torch.arange(64), last]
    loss = nn.functional.cross_entropy(head(hidden), labels, weight=torch.tensor([0.15, 0.85]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}  loss {loss:.3f}  decay {attention.decay.mean():.3f} per day")
