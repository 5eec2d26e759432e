"""Settings of `clinattn export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clinattn.training.fields import check, option


@dataclass(frozen=True)
class ExportSettings:
    """A trained model, and what is made of it. Raises ValueError.

    checkpoint: a step-*.pt of `clinattn train`, the folder of a run, or, for a program alone, a
    folder of transformers.
    """

    checkpoint: str
    output: Path | None = option(
        None, "A new folder: config.json, model.safetensors, vocabulary and a model card."
    )
    torch_export: Path | None = option(
        None, "FILE.pt2: a program of torch.export, for any number and length of sequences."
    )
    plain: bool = option(
        False, "With --torch-export: by plain torch alone, where clinattn is not installed."
    )
    evaluation: Path | None = option(
        None, "With --output: the JSON of clinattn evaluate, for the card."
    )
    data_title: str | None = option(None, "With --output: the name of the data, for the card.")

    def __post_init__(self) -> None:
        check(self)
        if self.output is None and self.torch_export is None:
            raise ValueError("got neither output nor torch_export: expected one or both")
        if self.plain and self.torch_export is None:
            raise ValueError("plain: expected only with torch_export")
        for name in ("evaluation", "data_title"):
            if getattr(self, name) is not None and self.output is None:
                raise ValueError(f"{name}: expected only with output, whose card has it")
        if self.torch_export is not None and self.torch_export.suffix != ".pt2":
            raise ValueError(f"torch_export={str(self.torch_export)!r}: expected FILE.pt2")
