"""The model that is exported, with what its checkpoint knows of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from clinattn.encoder import (
    CausalLanguageModel,
    EncoderConfig,
    MaskedLanguageModel,
    PretrainingModel,
    SequenceClassifier,
)
from clinattn.files.disk import parse_json
from clinattn.training.checkpoint import model_of
from clinattn.training.origin import resolve

# By the end of a class's name in config.json
HEADS: dict[str, type[Any]] = {
    "ForSequenceClassification": SequenceClassifier,
    "SequenceClassifier": SequenceClassifier,
    "ForMaskedLM": MaskedLanguageModel,
    "MaskedLanguageModel": MaskedLanguageModel,
    "CausalLanguageModel": CausalLanguageModel,
}


@dataclass(frozen=True)
class Exported:
    """A model in eval mode. saved: of its checkpoint, None for a folder of transformers.

    notes: sentences on what was left out.
    """

    module: Any
    path: Path
    saved: dict[str, Any] | None
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> EncoderConfig:
        return self.module.encoder.config

    @property
    def kind(self) -> type[Any]:
        """The class of clinattn.encoder that loads the weights; that of a number is one of it."""
        return next(kind for kind in HEADS.values() if isinstance(self.module, kind))

    def with_sdpa(self) -> nn.Module:
        """A copy whose attention is torch's, and which shares the weights."""
        config = replace(self.config, attention="sdpa")
        arguments: list[Any] = [config]
        if isinstance(self.module, SequenceClassifier):
            arguments.append(self.module.classifier.out_features)
        copy = self.kind(*arguments).to(next(self.module.parameters()).dtype)
        copy.load_state_dict(self.module.state_dict())
        return copy.eval()


def read_model(checkpoint: str) -> Exported:
    """Raises ValueError for what is no model, or a folder whose head is none of clinattn."""
    origin = resolve(checkpoint)
    notes = list(origin.damaged)
    if origin.saved is None:
        return Exported(_of_folder(origin.path).eval(), origin.path, None, tuple(notes))
    module = model_of(origin.saved, f"checkpoint {str(origin.path)!r}")
    if isinstance(module, PretrainingModel):
        module = module.masked
        notes.append("The head that says whether a text follows another is left out.")
    return Exported(module.eval(), origin.path, origin.saved, tuple(notes))


def _of_folder(path: Path) -> Any:
    settings = parse_json((path / "config.json").read_bytes())
    named = settings.get("architectures") if isinstance(settings, dict) else None
    name = str(named[0]) if isinstance(named, list) and named else ""
    for ending, kind in HEADS.items():
        if name.endswith(ending):
            return kind.from_pretrained(path)
    raise ValueError(
        f"{path / 'config.json'}: architectures={named}: expected one of {list(HEADS)}"
    )
