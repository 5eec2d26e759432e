"""Distillation for a small clinic: a student learns a teacher's soft labels and hidden states.

Labels by Hinton et al. (2015), states by TinyBERT (Jiao et al. 2020): a dense layer takes the
student's to the teacher's width. Arguments: a MEDS folder and the code to predict, or none.
"""

from timeit import timeit

import example_patients
import torch
from torch.nn.functional import cross_entropy, mse_loss

from clinattn.encoder import EncoderConfig, SequenceClassifier
from clinattn.training.batches import Batches, packed
from clinattn.training.corpus import read_corpus
from clinattn.training.metrics import auroc
from clinattn.training.settings import TrainingSettings

SMALL = {"hidden_size": 48, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "windows": ()}


def run(model, examples):
    """Returns logits (sequences, 2), labels and hidden states (tokens, hidden_size)."""
    ids, arguments = packed(examples, torch.device("cpu"))
    out = model.encoder.encode(ids, **arguments)
    return model.of_pooled(model.pooled(*out)), torch.tensor([x.label for x in examples]), out[0]


def train(name, examples, lr, teacher=None, temperature=2.0, **shape):
    torch.manual_seed(0)
    config = EncoderConfig.preset("tiny", vocab_size=len(corpus.tokens), **shape)
    model, widen = SequenceClassifier(config, 2), torch.nn.Linear(config.hidden_size, 192)
    optimizer = torch.optim.AdamW([*model.parameters(), *widen.parameters()], lr)
    batches = Batches(len(examples), examples.lengths, 2048, seed=0)
    for _ in range(150):
        batch = [examples[index] for index in batches.next()[1]]
        logits, labels, hidden = run(model, batch)
        loss = cross_entropy(logits, labels)
        if teacher is not None:
            taught, _, states = run(teacher, batch)
            soft = cross_entropy(logits / temperature, (taught / temperature).softmax(1))
            loss = 0.1 * loss + temperature**2 * soft + mse_loss(widen(hidden), states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    logits, labels, hidden = run(model, corpus.held_out)
    speed = 5 * len(hidden) / timeit(lambda: run(model, corpus.held_out), number=5)
    row = auroc(logits.diff()[:, 0], labels == 1), sum(map(torch.numel, model.parameters())), speed
    print("{:21} {:5.3f} {:9,} {:10,.0f}".format(name, *row))
    return model


with example_patients.given(1600) as (data, code):
    corpus = read_corpus(TrainingSettings(f"meds:{data}", "classify", label_code=code))
print(f"{'':21} AUROC   weights   tokens/s")
teacher = train("teacher", corpus.train, 5e-4)
train("student", corpus.train[:150], 3e-3, teacher, **SMALL)  # a small clinic has 150 patients
train("student from scratch", corpus.train[:150], 3e-3, **SMALL)
