"""Differentially private training with Opacus: no single patient can be read from the model.

The encoder keeps one row for each patient (layout="padded"); attention leaves the padding out.
"""

import warnings

import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from clinattn.encoder import EncoderConfig, SequenceClassifier

warnings.simplefilter("ignore")  # Opacus: its random numbers are not cryptographic by default
torch.manual_seed(0)
config = EncoderConfig.preset("tiny", vocab_size=50, hidden_size=24, num_layers=1, windows=())
model = SequenceClassifier(config, num_labels=2)
input_ids, lengths = torch.randint(2, 50, (256, 40)), torch.randint(2, 41, (256,))
labels = torch.arange(256) % 2
input_ids[:, 0] = labels  # codes 0 and 1 on admission tell the classes apart
engine = PrivacyEngine(accountant="rdp")
model, optimizer, loader = engine.make_private(
    module=model,
    optimizer=torch.optim.Adam(model.parameters(), 5e-3),
    data_loader=DataLoader(TensorDataset(input_ids, lengths, labels), batch_size=64),
    noise_multiplier=1.0,
    max_grad_norm=1.0,
)
for epoch in range(8):
    for ids, n, y in loader:
        optimizer.zero_grad()
        loss = model(ids, lengths=n, labels=y, layout="padded").loss
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}  loss {loss:.3f}  epsilon {engine.get_epsilon(delta=1e-3):.2f}")
