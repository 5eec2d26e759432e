"""Settings of `clinattn report-model`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clinattn.training.fields import check, check_device, option

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ReportSettings:
    """A model, and what it is run on; the metadata of each field say what it is.

    source: a folder with config.json, a config.json, or a model type. Raises ValueError.
    """

    source: str
    dtype: str = option("float32", "Type of the weights.", choices=tuple(DTYPES))
    batch_size: int = option(4, "Sequences of a batch.", least=1)
    tokens: int | None = option(
        None,
        "Tokens of the longest sequence; the shortest has a quarter.",
        least=1,
        shown="256, or what the model has positions for",
    )
    rounds: int = option(5, "Rounds of measurements.", least=1)
    train: bool = option(False, "Time forward and backward, not forward alone.")
    full_size: bool = option(False, "Give a model type its default configuration.")
    device: str = option(
        "cpu", "Where to run.", choices=("cpu", "cuda"), shown="cuda if there, else cpu"
    )
    threads: int | None = option(None, "Threads of torch.", least=1, shown="torch's")

    def __post_init__(self) -> None:
        check(self)
        check_device(self.device)
