"""The meaning of a model's outputs, and the columns of a file that say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clinattn.tools.evaluation.predictions import (
    LABEL,
    OF_CLASS,
    PROBABILITY,
    SAID_LABEL,
    SAID_VALUE,
    SAID_YES,
    VALUE,
    YES,
)

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Answer:
    """The classes of a model, or () for one that predicts a number or nothing.

    boolean: two classes, of which the second is what the MEDS label schema calls True.
    independent: each class has a probability for itself. pool: how windows answer for their note.
    mean, scale: the number predicted is mean + scale * output; scale is None without numbers.
    """

    classes: tuple[str, ...] = ()
    boolean: bool = False
    independent: bool = False
    pool: str = "mean"
    mean: float = 0.0
    scale: float | None = None

    @property
    def outputs(self) -> int:
        """The number of logits; 0 of a model that predicts nothing."""
        return len(self.classes) if self.scale is None else 1

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(R, classes) fp64 of logits."""
        if self.independent:
            return 1 / (1 + np.exp(-logits))
        e = np.exp(logits - logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def named(self, values: Sequence[Any]) -> list[str | None]:
        """Names of classes, of outcomes or predictions as a file has them."""
        if not self.boolean:
            return list(values)
        return [None if value is None else self.classes[int(value)] for value in values]

    def columns(self, logits: np.ndarray, outcomes: Sequence[Any]) -> dict[str, pa.Array]:
        """Columns of what is known and of what is predicted.

        Those of two classes of timelines are by the PredictionSchema of the package
        meds_evaluation, in which no outcome may be null: the column is absent where none is known.
        """
        import pyarrow as pa

        known = any(outcome is not None for outcome in outcomes)
        if self.scale is not None:
            found = {VALUE: pa.array(outcomes, pa.float64())} if known else {}
            return found | {SAID_VALUE: pa.array(logits[:, 0] * self.scale + self.mean)}
        p = self.probabilities(logits)
        if self.boolean:
            found = {YES: pa.array(outcomes, pa.bool_())} if known else {}
            return found | {
                SAID_YES: pa.array(p[:, 1] > p[:, 0]),
                PROBABILITY: pa.array(p[:, 1], pa.float32()),
            }
        found = {LABEL: pa.array(outcomes, pa.string())} if known else {}
        found[SAID_LABEL] = pa.array(np.array(self.classes)[p.argmax(1)], pa.string())
        return found | {
            f"{OF_CLASS}{name}": pa.array(p[:, i]) for i, name in enumerate(self.classes)
        }
