"""Checkpoints: written whole or not at all, the last few kept, read without running code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clinattn.encoder import (
    CausalLanguageModel,
    EncoderConfig,
    MaskedLanguageModel,
    PretrainingModel,
    SequenceClassifier,
)

FORMAT = 1
NAME = re.compile(r"step-(\d+)\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """Those in the folder, oldest first."""
    found = [
        (int(m[1]), path) for path in folder.glob("step-*.pt") if (m := NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write step-<step>.pt by way of a file beside it, then remove all but the last `keep`."""
    path = folder / f"step-{state['step']:08d}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state | {"format": FORMAT}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """On the CPU. Raises ValueError for what is no checkpoint of this format."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip and torch, as the damage may be
        first = str(error).partition("\n")[0]
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {first}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {str(path)!r}: expected one of clinattn train, format {FORMAT}"
        )
    return state


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model, in eval mode, and the checkpoint: tokens, classes, settings, step.

    Where its config has numeric_values, Standard(**checkpoint["standard"]) of standard.py puts
    values on the scale that the model was trained on.
    """
    state = load_checkpoint(Path(path))
    config = EncoderConfig(**state["config"])
    model: nn.Module
    match state["settings"]["task"]:
        case "classify":
            model = SequenceClassifier(config, len(state["classes"]))
        case "clm":
            model = CausalLanguageModel(config)
        case _ if state["settings"].get("nsp"):
            model = PretrainingModel(config)
        case _:
            model = MaskedLanguageModel(config)
    model.load_state_dict(state["model"])
    return model.eval(), state
