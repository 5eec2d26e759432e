"""Settings of a training run: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import InitVar, asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .fields import check, check_device, option

DEFAULT_PRESET = "tiny"
DEFAULT_LR = 1e-3  # of an encoder that begins anew, or goes on from a checkpoint of this library
FINE_TUNING_LR = 5e-5  # of a published model: the largest of three in BERT (Devlin et al., 2019)
TASKS = ("mlm", "clm", "classify")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Settings that may differ when a run goes on: where things lie, and what no weight depends on.
NOT_MATHS = (
    *("data", "tokenizer", "labels", "init", "output", "device", "threads"),
    *("text_column", "label_column", "id_column", "encoding"),
    *("save_every", "eval_every", "keep", "resume", "other_patients"),
    *("shard", "recompute", "compile"),
)


def presets() -> dict[str, str]:
    """The encoder's presets, each with a phrase."""
    from clinattn.encoder.presets import DESCRIPTIONS, PRESETS

    return {name: DESCRIPTIONS.get(name, "") for name in sorted(PRESETS)}


def profiles() -> dict[str, str]:
    """The length profiles, each with a phrase."""
    from clinattn.workloads.profiles import PROFILES

    return {name: profile.description for name, profile in PROFILES.items()}


def pools() -> dict[str, str]:
    """The ways from windows to a note, each with a phrase."""
    from .windows import PHRASES

    return PHRASES


@dataclass(frozen=True)
class TrainingSettings:
    """A task on the sequences of a source; the metadata of each field say what it is.

    meds_dir and text_file are other words for data, whose field holds what was said. Raises
    ValueError.
    """

    data: str | None = option(
        None,
        "Sequences to train on: meds:DIR, meds-torch:DIR, text:FILE or profile:NAME.",
        names=profiles,
    )
    task: str = option(
        "mlm", "Masked tokens, next tokens, or the classes of a label.", choices=TASKS
    )
    tokenizer: str | Path | None = option(
        None,
        "With text:FILE: a tokenizer.json, or a folder of transformers with a tokenizer.",
        shown="words, or that of --init",
    )
    vocabulary: int | None = option(
        None, "With text:FILE: train a WordPiece tokenizer of so many tokens on the texts.", least=6
    )
    text_column: str = option("text", "With text:FILE: the column of texts.")
    label_column: str = option("label", "With text:FILE: the column of classes.")
    id_column: str = option(
        "id", "With text:FILE and --labels: the column that joins labels to texts."
    )
    encoding: str | None = option(
        None,
        "With text:FILE: of what encoding the files are, such as big5.",
        shown="UTF-8, GB18030 or marked UTF-16",
    )
    overlap: float = option(
        0.25, "With classify on texts: share of a window that is in the next one of its note, too."
    )
    pool: str = option(
        "mean", "With classify on texts: how windows answer for their note.", choices=pools
    )
    label_code: str | None = option(
        None,
        "Classes of a MEDS folder: does a code such as 'ICU_*' follow a cut of the timeline before "
        "the next cut? Such codes are removed from the input.",
    )
    labels: str | Path | None = option(
        None,
        "With classify, of meds:DIR: a file or folder of parquet with subject_id, prediction_time "
        "and a column such as boolean_value; of text:FILE: a file with --id-column and label.",
    )
    cuts: int = option(
        1, "With --label-code: cuts of a timeline, at equal numbers of events.", least=1
    )
    held_out: float = option(
        0.2,
        "Share of patients, or subjects of rows, never trained on; where the data list splits, "
        "these count, and of this only if none is for tuning.",
    )
    min_count: int = option(2, "Codes or words seen less often in training are [UNK].", least=1)
    max_vocab: int | None = option(None, "Most token ids: rarer codes or words are [UNK].", least=1)
    preset: str | None = option(
        None, "Encoder.", choices=presets, shown=f"{DEFAULT_PRESET}, or that of --init"
    )
    init: str | Path | None = option(
        None,
        "Start from the encoder and vocabulary of this checkpoint, of this run's folder, or of "
        "this folder of transformers (BERT, RoBERTa, Longformer, Megatron-BERT, ModernBERT).",
    )
    other_patients: bool = option(
        False,
        "With --init: no patient of the data was in the training of the checkpoint, so the two may "
        "be split in different ways.",
    )
    max_tokens: int = option(512, "Most tokens of a sequence.", least=2)
    batch_tokens: int = option(4096, "Most tokens of a packed batch.")
    accumulate: int = option(1, "Batches of a step, all processes together.", least=1)
    steps: int = option(300, "Steps of the optimiser.", least=1)
    lr: float | None = option(
        None,
        "Learning rate at its peak.",
        shown=f"{DEFAULT_LR:g}; {FINE_TUNING_LR:g} from a folder of transformers",
    )
    warmup: float = option(0.1, "Share of the steps before the peak.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    clip: float = option(1.0, "Largest norm of the gradient; 0 is no limit.")
    mask_share: float = option(0.3, "Share of tokens to predict: BERT 0.15, ModernBERT 0.3.")
    nsp: bool = option(
        False, "With mlm: sequences are pairs, and whether the second follows is predicted, too."
    )
    dtype: str = option("float32", "bfloat16 is autocast with fp32 weights.", choices=tuple(DTYPES))
    shard: bool = option(
        False, "With torchrun: weights, gradients and moments in shards over the processes (FSDP2)."
    )
    recompute: bool = option(
        False, "Compute each layer again in the backward pass, in place of keeping what is inside."
    )
    compile: bool = option(False, "Layers by torch.compile, once for all lengths.")
    device: str = option(
        "cpu", "Where to run.", choices=("cpu", "cuda"), shown="cuda if there, else cpu"
    )
    threads: int | None = option(None, "Threads of torch.", least=1, shown="torch's")
    seed: int = option(0, "Seed of everything that is drawn.")
    output: str | Path = option("train/out", "Folder for checkpoints and metrics.")
    eval_every: int = option(100, "Steps between evaluations.", least=1)
    eval_tokens: int = option(
        2**20, "Most tokens of an evaluation: of more, whole patients are drawn, once.", least=1
    )
    save_every: int = option(100, "Steps between checkpoints.", least=1)
    keep: int = option(2, "Checkpoints that are kept.", least=1)
    resume: bool = option(False, "Go on from the last checkpoint in --output.")
    meds_dir: InitVar[str | Path | None] = None
    text_file: InitVar[str | Path | None] = None

    def __post_init__(self, meds_dir: str | Path | None, text_file: str | Path | None) -> None:
        from clinattn.workloads.opening import FORMS, from_words, parse_data

        data = from_words(self.data, meds_dir=meds_dir, text_file=text_file)
        object.__setattr__(self, "data", data)
        check(self)
        for name, low, high in (("held_out", 0, 1), ("mask_share", 0, 1)):
            if not low < getattr(self, name) < high:
                raise ValueError(f"{name}={getattr(self, name)}: expected {low} < x < {high}")
        for name, good, expected in (
            ("other_patients", not self.other_patients or self.init is not None, "init too"),
            ("nsp", not self.nsp or self.task == "mlm", f"False for task={self.task!r}"),
            ("max_tokens", not self.nsp or self.max_tokens >= 5, "at least 5 with nsp"),
            ("batch_tokens", self.batch_tokens >= self.max_tokens, "at least max_tokens"),
            ("lr", self.lr is None or 0 < self.lr < float("inf"), "more than 0"),
            ("overlap", 0 <= self.overlap < 1, "0 <= x < 1"),
            ("warmup", 0 <= self.warmup <= 1, "0 <= x <= 1"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "at least 0"),
            ("clip", 0 <= self.clip < float("inf"), "at least 0"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")
        if data is None:
            raise ValueError(f"data: got none, expected {FORMS}")
        kind = parse_data(data, self.tokenizer).kind
        self._check_labels(data, kind)
        self._check_text(kind)
        check_device(self.device)

    def _check_labels(self, data: str, kind: str) -> None:
        """Raises ValueError where the classes of the task are not said, or said twice."""
        if self.task == "classify" and kind == "profile":
            raise ValueError(
                f"task='classify': {data} has no labels, expected meds:DIR with label_code or "
                "labels, or text:FILE with a column label"
            )
        given = [name for name in ("label_code", "labels") if getattr(self, name) is not None]
        from clinattn.workloads.opening import of_timelines

        timelines = of_timelines(kind)
        if self.task == "classify" and timelines:
            if len(given) != 1:
                raise ValueError(
                    f"{' and '.join(given) or 'label_code and labels'}: got "
                    f"{'both' if given else 'neither'}, expected one of them for "
                    "task='classify' on a MEDS folder"
                )
        elif self.label_code is not None:
            raise ValueError(
                f"label_code={self.label_code!r} for task={self.task!r}: expected with task "
                "'classify' on a MEDS folder, and only there"
            )
        elif self.labels is not None and self.task != "classify":
            raise ValueError(f"labels: expected only with task='classify', not {self.task!r}")
        if timelines and self.labels is not None and self.cuts != 1:
            raise ValueError(f"cuts={self.cuts}: expected only with label_code, not with labels")

    def _check_text(self, kind: str) -> None:
        """Raises ValueError for settings of texts with other data, or that contradict."""
        for name in ("tokenizer", "init"):
            if self.vocabulary is not None and getattr(self, name) is not None:
                raise ValueError(f"vocabulary and {name}: got both, expected one of them")
        if kind == "text":
            return
        for name in ("vocabulary", "encoding"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected only with text:FILE, not with {kind}:")

    @property
    def room(self) -> int:
        """Most tokens of a sequence before a pair's [SEP] are put in its middle and at its end."""
        return self.max_tokens - 2 * self.nsp

    def maths(self) -> dict[str, Any]:
        """Settings that a resumed run must have in common with the run that it goes on with."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_MATHS}
