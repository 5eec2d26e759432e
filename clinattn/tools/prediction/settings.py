"""Settings of `clinattn predict`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinattn.files.disk import require_writable
from clinattn.training.fields import check, check_device, option
from clinattn.training.settings import DTYPES, TrainingSettings, pools
from clinattn.workloads.opening import parse_data
from clinattn.workloads.tables import Columns

FORMS = "meds:DIR, meds-torch:DIR or text:FILE"


@dataclass(frozen=True)
class PredictionSettings:
    """A trained model, the sequences that it reads, and where its predictions go.

    checkpoint: a step-*.pt of `clinattn train`, a run's folder, or a folder of transformers.
    Raises ValueError.
    """

    checkpoint: str
    data: str | None = option(None, f"Patients or notes to predict for: {FORMS}.")
    labels: Path | None = option(
        None,
        "With timelines: predict at the times of task labels, a file or folder of parquet with "
        "subject_id and prediction_time, and what is known. With text:FILE: a file of classes.",
    )
    at_end: bool = option(
        False,
        "Of timelines: predict at the last event, as for patients of today, whose outcome is not "
        "known yet.",
    )
    split: str | None = option(
        None,
        "Patients or notes of one split: train, tuning, held_out or the like, or all.",
        shown="held_out, else tuning",
    )
    tokenizer: Path | None = option(
        None, "With text:FILE: the tokenizer.json of a checkpoint that has none in it."
    )
    text_column: str = option("text", "With text:FILE: the column of texts.")
    label_column: str = option("label", "With text:FILE: the column of classes, if there is one.")
    id_column: str = option("id", "With text:FILE and --labels: the column that joins both.")
    encoding: str | None = option(
        None,
        "With text:FILE: of what encoding the file is, such as big5.",
        shown="UTF-8, GB18030 or marked UTF-16",
    )
    overlap: float | None = option(
        None,
        "With text:FILE: share of a window that is in the next one of its note, too.",
        shown=f"that of training, else {TrainingSettings.overlap}",
    )
    pool: str | None = option(
        None,
        "With text:FILE: how windows answer for their note.",
        choices=pools,
        shown=f"that of training, else {TrainingSettings.pool}",
    )
    output: Path | None = option(None, "File for the predictions, parquet, mode 0600.")
    embeddings: Path | None = option(
        None, "File for the mean of the last hidden states of each sequence, parquet, mode 0600."
    )
    batch_tokens: int = option(
        16_384, "Most tokens computed at once; a longer sequence is computed by itself.", least=1
    )
    dtype: str = option("float32", "bfloat16 is autocast with fp32 weights.", choices=tuple(DTYPES))
    device: str = option(
        "cpu", "Where to run.", choices=("cpu", "cuda"), shown="cuda if there, else cpu"
    )
    threads: int | None = option(None, "Threads of torch.", least=1, shown="torch's")
    resume: bool = option(False, "Go on with a run that was interrupted.")

    def __post_init__(self) -> None:
        check(self)
        if self.data is None:
            raise ValueError(f"data: got none, expected {FORMS}")
        kind = parse_data(self.data, self.tokenizer).kind
        if kind == "profile":
            raise ValueError(f"data={self.data!r}: expected {FORMS}")
        if self.overlap is not None and not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}: expected 0 <= x < 1")
        for name in ("overlap", "pool", "encoding"):
            if getattr(self, name) is not None and kind != "text":
                raise ValueError(f"{name}: expected only with text:FILE, got data={self.data!r}")
        if self.at_end and kind == "text":
            raise ValueError(f"at_end: expected only with timelines, got data={self.data!r}")
        if self.at_end and self.labels is not None:
            raise ValueError("at_end and labels: got both, expected one of them")
        if not self.files:
            raise ValueError("output: got none, expected a file for predictions, or embeddings")
        for name, path in self.files.items():
            require_writable(path, name)
        if len({os.path.realpath(path) for path in self.files.values()}) < len(self.files):
            raise ValueError(f"output and embeddings: got {str(self.output)!r} for both")
        check_device(self.device)

    @property
    def files(self) -> dict[str, Path]:
        """The files to write, by the name of the setting."""
        given = {"output": self.output, "embeddings": self.embeddings}
        return {name: Path(path) for name, path in given.items() if path is not None}

    @property
    def table(self) -> dict[str, Any]:
        """The arguments of read_rows by which a file of texts is read."""
        columns = Columns(self.text_column, self.label_column, self.id_column)
        return {"columns": columns, "labels": self.labels, "encoding": self.encoding}
