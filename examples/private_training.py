"""Differentially private training with Opacus: no single patient can be read from the model.

A sample is a patient, drawn by Poisson sampling, and padded rows have a gradient each. The epsilon
spent is in private/metrics.jsonl, the checkpoint, and the model card of `clinattn export private`.
Arguments: a MEDS folder and the code to predict, or none.
"""

import warnings
from pathlib import Path

import example_patients
import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from clinattn.encoder import EncoderConfig, SequenceClassifier
from clinattn.training.batches import padded
from clinattn.training.checkpoint import content_of, save_checkpoint
from clinattn.training.corpus import read_corpus
from clinattn.training.metrics import MetricsFile, auroc
from clinattn.training.settings import TrainingSettings

EPOCHS, FOLDER = 12, Path("private")
warnings.simplefilter("ignore")  # Opacus: its random numbers are not cryptographic by default
torch.manual_seed(0)
with example_patients.given(600, fell_before=False) as (data, code):
    settings = TrainingSettings(f"meds:{data}", "classify", label_code=code, output=FOLDER)
    corpus = read_corpus(settings)  # its codes, of the patients trained on, are not private


def tensors(examples):
    ids, arguments = padded(examples, torch.device("cpu"))
    return ids, arguments["lengths"], torch.tensor([example.label for example in examples])


train, (ids, lengths, labels) = tensors(corpus.train), tensors(corpus.held_out)
shape = {"hidden_size": 24, "num_layers": 1, "windows": (), "pooling": "mean"}
own = SequenceClassifier(EncoderConfig.preset("tiny", vocab_size=len(corpus.tokens), **shape), 2)
engine, privacy = PrivacyEngine(), {"unit": "patient", "delta": len(train[0]) ** -1.1}
model, optimizer, loader = engine.make_private_with_epsilon(
    module=own, optimizer=torch.optim.Adam(own.parameters(), 5e-3), epochs=EPOCHS,
    data_loader=DataLoader(TensorDataset(*train), 64), poisson_sampling=True,
    target_epsilon=8.0, target_delta=privacy["delta"], max_grad_norm=1.0,
)  # fmt: skip
FOLDER.mkdir()
metrics = MetricsFile(FOLDER / "metrics.jsonl", 0)
for epoch in range(EPOCHS):
    for rows, n, y in loader:
        optimizer.zero_grad()
        model(rows, lengths=n, labels=y, layout="padded").loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = own(ids, lengths=lengths, layout="padded").logits.diff()[:, 0]
    privacy["epsilon"] = float(engine.get_epsilon(privacy["delta"]))
    score = {"auroc": auroc(scores, labels == 1)} | privacy
    metrics.write({"step": (epoch + 1) * len(loader), "split": "held_out"} | score)
    print("auroc {auroc:.3f} epsilon {epsilon:.2f}".format(**score))
content = content_of(settings, corpus, own, optimizer, EPOCHS * len(loader))
save_checkpoint(FOLDER, content | {"privacy": privacy}, keep=1)
