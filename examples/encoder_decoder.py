"""A torch.nn.Transformer whose attention becomes clinattn's by one call: notes to codes.

It learns to write a padded sequence backwards, with causal attention in the decoder.
"""

import torch
from torch import nn

import clinattn

torch.manual_seed(0)
embed, head = nn.Embedding(12, 32), nn.Linear(32, 12)
model = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
print(clinattn.replace_attention(model))
place = nn.Parameter(torch.randn(10, 32) / 4)
parameters = [*embed.parameters(), *head.parameters(), *model.parameters(), place]
optimizer = torch.optim.Adam(parameters, 3e-3)
causal = nn.Transformer.generate_square_subsequent_mask(9)
for step in range(301):
    lengths = torch.randint(2, 10, (64,))
    padding = torch.arange(9) >= lengths[:, None]
    source = torch.randint(2, 12, (64, 9)).masked_fill(padding, 0)  # 0: padding, 1: start
    backwards = (lengths[:, None] - 1 - torch.arange(9)).clamp(min=0)
    target = source.gather(1, backwards).masked_fill(padding, 0)
    shifted = torch.cat([torch.ones(64, 1, dtype=torch.long), target[:, :-1]], 1)
    hidden = model(
        embed(source) + place[:9],
        embed(shifted) + place[:9],
        tgt_mask=causal,
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    loss = nn.functional.cross_entropy(head(hidden).mT, target, ignore_index=0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3}  loss {loss:.3f}")
