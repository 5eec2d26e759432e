"""Small encoders, each with another set of parts, and the ragged batch they are tested on."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from clinattn.encoder import Encoder, EncoderConfig

with torch.device("meta"):  # now: torch notes its constructors as they stand at the first use,
    torch.empty(0)  # and would allocate, and fill, what tests have replaced

LENGTHS = (17, 1, 63, 40)
MODERN = EncoderConfig(
    vocab_size=101,
    hidden_size=48,
    num_layers=3,
    num_heads=3,
    intermediate_size=40,
    max_positions=64,
    first_norm=False,
    rotary_base=160_000.0,
    windows=(None, 5, 5),
)
BERT = replace(
    MODERN,
    norm="post",
    norm_eps=1e-12,
    norm_bias=True,
    linear_bias=True,
    positions="learned",
    activation="gelu",
    windows=(),
    token_types=2,
)
LONGFORMER = replace(
    BERT,
    max_positions=66,
    position_offset=2,
    windows=(3, 5, 5),
    global_prefix=2,
    global_projections=True,
)
CONFIGS = {
    "modernbert": MODERN,
    "bert": BERT,
    "bert_rotary_window": replace(BERT, positions="rotary", windows=(7, 0, None)),
    "pre_learned_geglu": replace(MODERN, positions="learned", first_norm=True, linear_bias=True),
    "one_head": replace(MODERN, num_heads=1),
    "causal": replace(MODERN, causal=True, windows=(None, 5, 0)),
    "parallel": replace(MODERN, parallel=True, first_norm=True),
    "longformer": LONGFORMER,
    "global_prefix": replace(MODERN, global_prefix=2, windows=(None, 5, 0)),
}


def make_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, N) with a random token, not a special one, in the padding; lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MODERN.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return ids, torch.tensor(LENGTHS)


def pack(padded: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, LENGTHS, strict=True)])


def cu_seqlens() -> torch.Tensor:
    return torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)


def seeded(kind, config, *args) -> nn.Module:
    """A model whose attention matters: torch's usual 0.02 leaves every softmax almost flat."""
    torch.manual_seed(0)
    model = kind(config, *args)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[0] != config.vocab_size:
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
    return model


def with_sdpa(model: nn.Module) -> nn.Module:
    """The same weights with attention='sdpa'."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Encoder):
            module.config = replace(module.config, attention="sdpa")
    return twin
