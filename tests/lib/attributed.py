"""Small classifiers whose answers are attributed."""

from __future__ import annotations

import torch
from torch import nn

from clinattn.encoder import EncoderConfig, SequenceClassifier

N = 9  # tokens of a sequence, of padded ones with LENGTHS
LENGTHS = torch.tensor([9, 5, 1])
SMALL = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24}
BERT = EncoderConfig.preset("clinicalbert", vocab_size=50, windows=(), **SMALL)
MODERN = EncoderConfig.preset(
    "bioclinical-modernbert-base", vocab_size=50, windows=(None, 3, 3), **SMALL
)
CAUSAL = EncoderConfig.preset("clmbr", vocab_size=50, windows=(3, None, 3), **SMALL)
CONFIGS = {"bert": BERT, "modernbert": MODERN, "clmbr": CAUSAL}


def classifier(config, dtype=torch.float32):
    model = SequenceClassifier(config, 3).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(config):
    ids = torch.randint(1, 50, (3, N))
    if config.positions == "rotary_time":
        return {"inputs": ids, "positions": (torch.rand(3, N) * 50).sort(1).values}
    return {"inputs": ids}
