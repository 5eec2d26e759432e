"""accelerate over packed notes: a loop of your own, one process or many (accelerate launch).

A tiny, randomly initialised ModernBERT fills in masked words: 2 3 4 5 ... from any start.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import ModernBertConfig, ModernBertForMaskedLM

import clinattn
from clinattn.integrations.trainer import PackingCollator, TokenBudgetSampler, lengths_of

MASK = 1
draw = torch.Generator().manual_seed(0)
notes = []
for length in torch.randint(4, 60, (400,), generator=draw).tolist():
    ids = 2 + (torch.randint(0, 30, (1,), generator=draw) + torch.arange(length)) % 30
    masked = torch.rand(length, generator=draw) < 0.15
    notes.append({"input_ids": ids.where(~masked, MASK), "labels": ids.where(masked, -100)})

size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
config = ModernBertConfig(vocab_size=32, **size, intermediate_size=64, pad_token_id=0)
model = ModernBertForMaskedLM(config)
print(clinattn.replace_attention(model))
sampler = TokenBudgetSampler(lengths_of(notes), max_tokens=512)
loader = DataLoader(notes, batch_sampler=sampler, collate_fn=PackingCollator(model))
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(8):
    loader.set_epoch(epoch)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch} loss {loss.item():.4f}")
