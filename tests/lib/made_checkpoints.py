"""Checkpoints of models with random weights, as training writes them, without training."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from runs import SMALL
from torch import nn

from clinattn.encoder import (
    CausalLanguageModel,
    EncoderConfig,
    MaskedLanguageModel,
    PretrainingModel,
    SequenceClassifier,
)
from clinattn.training.checkpoint import save_checkpoint
from clinattn.workloads import SPECIAL_TOKENS

# ModernBERT of transformers has no dropout in its layers
MODERN = replace(SMALL, hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
CODES = tuple(f"CODE//{i}" for i in range(40))
CLASSES = ["absent", "present"]


def write_made(
    folder: Path,
    config: EncoderConfig,
    task: str = "classify",
    target: dict[str, Any] | None = None,
    **more,
) -> Path:
    """A checkpoint of step 7. target: of a model of a number. more: settings such as nsp.

    Returns its path.
    """
    torch.manual_seed(1)
    classes = CLASSES if task == "classify" and target is None else []
    model: nn.Module
    if task == "classify":
        model = SequenceClassifier(config, len(classes) or 1)
    elif task == "clm":
        model = CausalLanguageModel(config)
    else:
        model = (PretrainingModel if more.get("nsp") else MaskedLanguageModel)(config)
    with torch.no_grad():
        for x in model.parameters():  # large enough for attention to matter
            x.add_(torch.randn_like(x) * 0.1)
    size = config.vocab_size
    scales = {"mean": torch.full((size,), float("nan")), "scale": torch.ones(size)}
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": 7,
        "epoch": 0,
        "place": 0,
        "model": model.state_dict(),
        "optimiser": {"state": {}, "param_groups": []},
        "settings": {"task": task, "preset": "tiny", "held_out": 0.2, "max_tokens": 64} | more,
        "data": "0123abcd",
        "config": asdict(config),
        "tokens": [*SPECIAL_TOKENS, *CODES],
        "classes": classes,
        "standard": scales if config.numeric_values else None,
    }
    if target is not None:
        state["target"] = target
    return save_checkpoint(folder, state, keep=9)
