"""Differential privacy of a hospital's patients, by Opacus: the noise, and what is spent."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from clinattn.training.batches import padded
from clinattn.training.sequences import Example


def train_in_private(
    model: torch.nn.Module, patients: Sequence[Example], noise: float, steps: int, lr: float
) -> None:
    """Trains about one pass, of `steps` steps, with noise on the gradients of patients.

    Patients and noise are drawn from a seed that nobody knows: with the seed, the noise could be
    taken off again.
    """
    from opacus import PrivacyEngine

    ids, arguments = padded(patients, torch.device("cpu"))
    rows = TensorDataset(ids, arguments["lengths"], torch.tensor([x.label for x in patients]))
    secret, copied = torch.Generator(), copy.deepcopy(model).train()
    secret.seed()
    private, optimiser, loader = PrivacyEngine().make_private(
        module=copied,
        optimizer=torch.optim.Adam(copied.parameters(), lr),
        data_loader=DataLoader(rows, math.ceil(len(rows) / steps), generator=secret),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        noise_generator=secret,
    )
    for drawn, lengths, labels in loader:
        optimiser.zero_grad()
        private(drawn, lengths=lengths, labels=labels, layout="padded").loss.backward()
        optimiser.step()
    model.load_state_dict(copied.state_dict())


def spent(patients: int, noise: float, steps: int, rounds: int) -> dict[str, Any]:
    """Returns unit, delta and epsilon of `rounds` rounds; of a hospital, for whoever sees all."""
    from opacus.accountants import PRVAccountant

    accountant, delta = PRVAccountant(), patients**-1.1
    drawn = math.ceil(patients / math.ceil(patients / steps))  # steps of a round
    accountant.history = [(noise, 1 / drawn, rounds * drawn)]
    return {"unit": "patient", "delta": delta, "epsilon": float(accountant.get_epsilon(delta))}
