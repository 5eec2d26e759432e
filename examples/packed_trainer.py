"""Hugging Face Trainer over packed notes: no padding, batches by a budget of tokens.

A tiny, randomly initialised BERT learns which words of a note are ruled out: all after "no".
"""

import random
import tempfile

from transformers import BertConfig, BertForTokenClassification, TrainingArguments

import clinattn
from clinattn.integrations.trainer import PackedTrainer

FINDINGS = "pneumonia effusion fracture sepsis anemia edema stroke ileus".split()
words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "no", *FINDINGS])}


def note(draw):
    found = draw.sample(FINDINGS, draw.randint(1, 4))
    absent = draw.choices(FINDINGS, k=draw.randint(1, 20))
    labels = [-100] + [0] * len(found) + [-100] + [1] * len(absent)
    return {"input_ids": [words[x] for x in ["[CLS]", *found, "no", *absent]], "labels": labels}


notes = [note(random.Random(i)) for i in range(600)]
size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
model = BertForTokenClassification(BertConfig(vocab_size=11, **size, intermediate_size=64))
print(clinattn.replace_attention(model))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=3, learning_rate=3e-3, logging_steps=16, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = PackedTrainer(model, arguments, train_dataset=notes[100:], max_tokens=256)
    trainer.train()
    results = trainer.predict(notes[:100])  # of each note, in order, (100, N, 2)
right = results.predictions.argmax(-1) == results.label_ids
print(f"accuracy {right[results.label_ids >= 0].mean():.3f}")
