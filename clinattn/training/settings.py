"""Settings of a training run: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clinattn.encoder import PRESETS

TASKS = ("mlm", "clm", "classify")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Settings that may differ when a run goes on: where things lie, and what no weight depends on.
NOT_MATHS = (
    *("meds_dir", "text_file", "tokenizer", "init", "output", "device", "threads"),
    *("save_every", "eval_every", "keep", "resume"),
)


@dataclass(frozen=True)
class Settings:
    """A task on the patients of a MEDS folder, or on the rows of a text file.

    label_code: the classes of task "classify" on a MEDS folder: whether a code that matches this
        pattern (* and ? as in a shell) follows a cut of the timeline before the next cut. Such
        codes are removed from the input. cuts: how many a timeline has, at equal numbers of events.
    min_count, max_vocab: rarer codes or words of the training split, and those past so many
        tokens, are [UNK].
    max_tokens: of a sequence. batch_tokens: of a batch, at most. accumulate: batches of a step,
        over all ranks together.
    lr: at its peak, after the first `warmup` of the steps. clip: of the gradient's norm, 0 = none.
    nsp: with task "mlm": sequences are pairs, and whether the second part follows is told too.
    dtype: "bfloat16" computes under autocast with fp32 weights.
    init: a checkpoint whose encoder and vocabulary are where this run starts.
    Raises ValueError.
    """

    task: str = "mlm"
    meds_dir: str | Path | None = None
    text_file: str | Path | None = None
    tokenizer: str | Path | None = None
    label_code: str | None = None
    cuts: int = 1
    held_out: float = 0.2
    min_count: int = 2
    max_vocab: int | None = None
    preset: str = "tiny"
    init: str | Path | None = None
    max_tokens: int = 512
    batch_tokens: int = 4096
    accumulate: int = 1
    steps: int = 300
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    mask_share: float = 0.3
    nsp: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    output: str | Path = "train/out"
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("task", TASKS),
            ("preset", tuple(sorted(PRESETS))),
            ("dtype", tuple(DTYPES)),
            ("device", ("cpu", "cuda")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")
        for name in (
            *("cuts", "min_count", "max_vocab", "accumulate", "steps"),
            *("threads", "eval_every", "save_every", "keep"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        for name, low, high in (("held_out", 0, 1), ("mask_share", 0, 1)):
            if not low < getattr(self, name) < high:
                raise ValueError(f"{name}={getattr(self, name)}: expected {low} < x < {high}")
        for name, good, expected in (
            ("nsp", not self.nsp or self.task == "mlm", f"False for task={self.task!r}"),
            ("max_tokens", self.max_tokens >= 2, "at least 2"),
            ("max_tokens", not self.nsp or self.max_tokens >= 5, "at least 5 with nsp"),
            ("batch_tokens", self.batch_tokens >= self.max_tokens, "at least max_tokens"),
            ("lr", 0 < self.lr < float("inf"), "more than 0"),
            ("warmup", 0 <= self.warmup <= 1, "0 <= x <= 1"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "at least 0"),
            ("clip", 0 <= self.clip < float("inf"), "at least 0"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")
        if (self.meds_dir is None) == (self.text_file is None):
            both = "both" if self.meds_dir is not None else "neither"
            raise ValueError(f"meds_dir and text_file: got {both}, expected exactly one of them")
        if self.tokenizer is not None and self.text_file is None:
            raise ValueError("tokenizer: expected only with text_file")
        by_code = self.task == "classify" and self.meds_dir is not None
        if by_code != (self.label_code is not None):
            raise ValueError(
                f"label_code={self.label_code!r} for task={self.task!r}: expected with task "
                "'classify' on a MEDS folder, and only there"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': expected a CUDA device, and torch sees none")

    @property
    def room(self) -> int:
        """Most tokens of a sequence before a pair's [SEP] are put in its middle and at its end."""
        return self.max_tokens - 2 * self.nsp

    def maths(self) -> dict[str, Any]:
        """Settings that a resumed run must have in common with the run that it goes on with."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_MATHS}
