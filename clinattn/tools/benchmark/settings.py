"""Settings of `clinattn bench`, and the part of them that `clinattn profile` shares."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from pathlib import Path

import torch

from clinattn.training.fields import check, check_device, option
from clinattn.training.settings import presets, profiles

MODES = ("train", "infer")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DATA = "profile:note_discharge"
# What --quick takes for the settings that are not given: a minute, with start and plots. Four
# sequences of 4096 take longer than a minute, however small the budget.
QUICK = {"budget_s": 45.0, "max_tokens": 2048}


@dataclass(frozen=True)
class EncoderSettings:
    """An encoder, and the sequences that it is run on; the metadata of each field say what it is.

    meds_dir, text_file and profile are other words for data, whose field holds what was said.
    Raises ValueError.
    """

    data: str | None = option(
        None,
        "Sequences to run: meds:DIR, meds-torch:DIR, text:FILE or profile:NAME.",
        names=profiles,
        shown=DEFAULT_DATA,
    )
    tokenizer: str | Path | None = option(None, "With text:FILE: a tokenizer.json.", shown="words")
    split: str | None = option(
        None,
        "Sequences of one split, such as tuning, or all.",
        shown="train where the data list splits, else all",
    )
    preset: str = option("tiny", "Encoder.", choices=presets)
    max_tokens: int = option(4096, "Longer sequences are cut.", least=2)
    full_attention: bool = option(False, "Drop the preset's windows.")
    dtype: str = option("float32", "Type of the weights.", choices=tuple(DTYPES))
    device: str = option(
        "cpu", "Where to run.", choices=("cpu", "cuda"), shown="cuda if there, else cpu"
    )
    threads: int | None = option(None, "Threads of torch.", least=1, shown="torch's")
    batch_size: int | None = option(
        None, "Sequences of a batch.", least=1, shown="about 16,384 tokens"
    )
    seed: int = option(0, "Seed of weights, drawn sequences and masks.")
    meds_dir: InitVar[str | Path | None] = None
    text_file: InitVar[str | Path | None] = None
    profile: InitVar[str | None] = None

    def __post_init__(
        self, meds_dir: str | Path | None, text_file: str | Path | None, profile: str | None
    ) -> None:
        from clinattn.workloads.opening import from_words, parse_data

        words = {"meds_dir": meds_dir, "text_file": text_file, "profile": profile}
        data = from_words(self.data, **words) or DEFAULT_DATA
        object.__setattr__(self, "data", data)
        check(self)
        parse_data(data, self.tokenizer)
        check_device(self.device)


@dataclass(frozen=True)
class BenchmarkSettings(EncoderSettings):
    """Settings of a benchmark. sequences, batch_size, rounds: None to follow from budget_s seconds.

    budget_s is a deadline: what has been measured by then is the result.
    """

    modes: tuple[str, ...] = option(MODES, "Passes to time, separated by commas.", choices=MODES)
    sequences: int | None = option(None, "Sequences to run.", least=1, shown="what fits the time")
    rounds: int | None = option(
        None, "Rounds of measurements.", least=1, shown="what fits the time"
    )
    budget_s: float = option(
        270.0, "Seconds until what has been measured is shown.", name="--budget"
    )

    def __post_init__(
        self, meds_dir: str | Path | None, text_file: str | Path | None, profile: str | None
    ) -> None:
        super().__post_init__(meds_dir, text_file, profile)
        if not self.budget_s > 0:
            raise ValueError(f"budget_s={self.budget_s}: expected more than 0")


def variants() -> tuple[str, ...]:
    """The names of the ways to run an encoder."""
    from .variants import VARIANTS

    return tuple(variant.name for variant in VARIANTS)


@dataclass(frozen=True)
class ProfileSettings(EncoderSettings):
    """Settings of `clinattn profile`: steps over one batch, in one way and one mode."""

    max_tokens: int = option(2048, "Longer sequences are cut.", least=2)
    batch_size: int | None = option(4, "Sequences of the batch.", least=1)
    mode: str = option("train", "Pass to profile.", choices=MODES)
    variant: str = option("clinattn_packed", "Way to run the encoder.", choices=variants)
    steps: int = option(3, "Steps of the window or trace.", least=1)
