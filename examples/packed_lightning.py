"""Lightning over packed notes: each process its share, and a stop within an epoch is no loss.

A tiny, randomly initialised BERT learns which notes have the word 2, a label for each note.
"""

import lightning
import torch
from transformers import BertConfig, BertForSequenceClassification

import clinattn
from clinattn.integrations.trainer import PackedDataLoader, PackingCollator, TokenBudgetSampler

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
torch.manual_seed(0)
lengths = torch.randint(4, 60, (600,)).tolist()
notes = [{"input_ids": torch.randint(2, 40, (n,))} for n in lengths]
for note in notes:
    note["input_ids"][0] = 1  # [CLS], whose vector the head reads
    note["labels"] = int(2 in note["input_ids"])


class Finder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = BertForSequenceClassification(BertConfig(vocab_size=40, **SIZE))
        print(clinattn.replace_attention(self.model))

    def training_step(self, batch, index):
        print("loss", (loss := self.model(**batch).loss).item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


finder = Finder()
batches = TokenBudgetSampler(lengths, max_tokens=512)
loader = PackedDataLoader(notes, batch_sampler=batches, collate_fn=PackingCollator(finder.model))
lightning.Trainer(accelerator="cpu", max_epochs=20, logger=False).fit(finder, loader)
