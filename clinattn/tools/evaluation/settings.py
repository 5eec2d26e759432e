"""Settings of `clinattn evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clinattn.training.fields import check, option

DECIDED = 0.5  # the least probability that is a yes, where nobody says another


@dataclass(frozen=True)
class EvaluateSettings:
    """A file of predictions, and what is asked of it.

    predictions: parquet by the MEDS evaluation schema, or with the columns of `clinattn predict`
    for more classes or numbers. by: columns, or globs of codes. Raises ValueError.
    """

    predictions: str | Path
    by: tuple[str, ...] = ()
    data: str | None = option(None, "With a code as --by: the events, meds:DIR.")
    table: Path | None = option(
        None, "Columns for --by: parquet, csv or tsv with one row for each subject_id."
    )
    explanation: Path | None = option(
        None,
        "What clinattn explain --json wrote of one prediction, to stand on the page. The files "
        "have mode 0600 then.",
    )
    resamples: int = option(1000, "Resamples of the patients for each interval.", least=100)
    threshold: float | None = option(
        None,
        "The least probability that counts as a yes.",
        shown=f"the file's decisions, else {DECIDED}",
    )
    bins: int = option(10, "Groups of equal size for calibration.", least=2)
    seed: int = option(0, "Seed of the resamples.")

    def __post_init__(self) -> None:
        check(self)
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold}: expected 0 < x < 1")
        if len(set(self.by)) < len(self.by):
            raise ValueError(f"by={self.by}: expected different ones")
        if "" in self.by:
            raise ValueError("by='': expected a column, or a glob of codes")
        if self.data is not None:
            kind, _, folder = self.data.partition(":")
            if kind != "meds" or not folder:
                raise ValueError(f"data={self.data!r}: expected meds:DIR, a MEDS folder")
        for name in ("data", "table"):
            if getattr(self, name) is not None and not self.by:
                raise ValueError(f"{name}={str(getattr(self, name))!r}: expected only with by")
