"""Hugging Face Trainer fine-tunes a BERT whose attention became clinattn's by one call.

A tiny, randomly initialised BERT learns to tell present from ruled-out findings.
"""

import itertools
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import clinattn

FINDINGS = "pneumonia effusion fracture sepsis anemia edema stroke ileus".split()
PHRASES = ["patient has {}", "acute {} on imaging", "no sign of {}", "{} was ruled out today"]
cases = list(itertools.product(range(4), FINDINGS)) * 8
texts = [PHRASES[i].format(finding).split() for i, finding in cases]
words = {word: 1 + i for i, word in enumerate(sorted(set(itertools.chain(*texts))))}


def collate(rows):
    ids = [torch.tensor([words[word] for word in texts[row]]) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.tensor([int(cases[row][0] >= 2) for row in rows])
    return {"input_ids": input_ids, "attention_mask": input_ids.ne(0).long(), "labels": labels}


config = BertConfig(
    vocab_size=len(words) + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, hidden_dropout_prob=0.0,
)  # fmt: skip
model = BertForSequenceClassification(config)
print(clinattn.replace_attention(model))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=2, learning_rate=3e-3, logging_steps=16, report_to="none",
        use_cpu=True, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, collate, train_dataset=range(len(cases))).train()
