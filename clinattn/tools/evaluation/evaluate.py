"""From settings to the record of an evaluation, in plain values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from clinattn.tools.environment import environment
from clinattn.tools.evaluation.binary import Binary, of_prevalence
from clinattn.tools.evaluation.bootstrap import LEVEL, Interval, intervals
from clinattn.tools.evaluation.explained import read_explanation
from clinattn.tools.evaluation.groups import Grouping, groupings
from clinattn.tools.evaluation.others import Classes, Numbers, of_frequencies, of_mean
from clinattn.tools.evaluation.predictions import Predictions, read_predictions
from clinattn.tools.evaluation.settings import DECIDED, EvaluateSettings
from clinattn.workloads.seeds import derived_seed

FEW = 10  # patients of a class below which intervals are too narrow, and a warning says so
EVERYBODY = "all"
OF_ALL = ("accuracy", "brier", "calibration_error", "observed_over_expected")  # need no class

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]


def evaluated(settings: EvaluateSettings, progress: Progress) -> Record:
    """The record: figures of all rows and of each group, calibration, ROC curve, warnings.

    Raises ValueError for bad input, before anything is measured.
    """
    progress(f"read: {settings.predictions}", 0, 1)
    predictions = read_predictions(settings.predictions)
    if predictions.kind != "binary" and settings.threshold is not None:
        raise ValueError(f"threshold={settings.threshold}: expected only for a yes or no")
    if predictions.scores is None and settings.threshold is not None:
        raise ValueError(f"threshold={settings.threshold}: the file has decisions alone")
    explanation = None
    if settings.explanation is not None:
        explanation = read_explanation(settings.explanation, predictions.facts)
    asked = groupings(settings, predictions)
    work: list[tuple[str | None, str, np.ndarray]] = [
        (None, EVERYBODY, np.arange(len(predictions.truth)))
    ]
    for grouping in asked:
        for i, name in enumerate(grouping.names):
            work.append((grouping.title, name, np.flatnonzero(grouping.of_row == i)))
    decided = _decided(settings, predictions)
    found = []
    for i, (by, name, rows) in enumerate(work):

        def tick(share: float, i: int = i) -> None:
            progress("measure: " + f"{len(work)} groups", int((i + share) * 1000), len(work) * 1000)

        seed = derived_seed("evaluate", settings.seed, str(by), name)
        found.append(
            {"by": by, "name": name} | _group(settings, predictions, decided, rows, seed, tick)
        )
    return _record(settings, predictions, asked, found) | {"explanation": explanation}


def is_private(record: Record) -> bool:
    """Returns whether the record holds data of one person."""
    return record["explanation"] is not None


def _record(
    settings: EvaluateSettings, predictions: Predictions, asked: list[Grouping], found: list[Record]
) -> Record:
    whole = found[0]
    facts = environment()
    return {
        "schema": 1,
        "kind": "evaluation",
        "task": predictions.kind,
        "classes": list(predictions.classes),
        "source": predictions.facts,
        "unit": predictions.unit,
        "rows": whole["rows"],
        "patients": whole["patients"],
        "unlabelled": predictions.unlabelled,
        "duplicates": predictions.duplicates,
        "probabilities": predictions.scores is not None,
        "calibrated": predictions.calibrated,
        "threshold": _threshold(settings, predictions),
        "level": LEVEL,
        "resamples": settings.resamples,
        "seed": settings.seed,
        "by": [grouping.title for grouping in asked],
        "groups": found,
        "warnings": _warnings(predictions, whole),
        "environment": {name: facts[name] for name in ("date", "clinattn", "commit", "numpy")},
    }


def _threshold(settings: EvaluateSettings, predictions: Predictions) -> float | None:
    """The least probability that is a yes; None where the file's decisions are taken."""
    if predictions.kind != "binary" or predictions.scores is None:
        return None
    if settings.threshold is None and predictions.decided is not None:
        return None
    return DECIDED if settings.threshold is None else settings.threshold


def _decided(settings: EvaluateSettings, predictions: Predictions) -> np.ndarray | None:
    threshold = _threshold(settings, predictions)
    if threshold is None:
        return predictions.decided
    assert predictions.scores is not None
    return predictions.scores >= threshold


def _group(
    settings: EvaluateSettings,
    predictions: Predictions,
    decided: np.ndarray | None,
    rows: np.ndarray,
    seed: int,
    tick: Callable[[float], None],
) -> Record:
    """Numbers of patients and rows, and figures, of a group."""
    truth, scores = predictions.truth[rows], predictions.scores
    own = np.unique(predictions.patient[rows], return_inverse=True)[1]
    found: Record = {"rows": len(rows), "patients": int(own.max()) + 1}
    mine = None if scores is None else scores[rows]
    measure: Any
    if predictions.kind == "binary":
        assert decided is not None
        measure = Binary(truth, mine, decided[rows], predictions.calibrated, settings.bins)
        found |= {
            "positives": int(truth.sum()),
            "patients_with": len(np.unique(own[truth])),
            "patients_without": len(np.unique(own[~truth])),
            "baseline": of_prevalence(float(truth.mean())),
        }
        if mine is not None:
            found["predicted"] = float(mine.mean())
    elif predictions.kind == "classes":
        assert decided is not None and mine is not None
        measure = Classes(truth, mine, decided[rows])
        counts = np.bincount(truth, minlength=len(predictions.classes))
        found |= {"of_class": counts.tolist(), "baseline": of_frequencies(truth)}
    else:
        assert mine is not None
        measure = Numbers(truth, mine)
        found |= {"mean": float(truth.mean()), "baseline": of_mean(truth)}
    drawn = intervals(measure, own, settings.resamples, seed, tick)
    of_bins, of_classes = drawn.pop("observed", None), drawn.pop("auroc_of", None)
    found["figures"] = {
        name: figure(x, missing(name, found, measure), _drawn_from(name, found))
        for name, x in drawn.items()
    }
    if of_bins is not None:
        low, high = of_bins.low[::-1].tolist(), of_bins.high[::-1].tolist()
        found["reliability"] = [
            bin | {"low": _plain(a), "high": _plain(b)}
            for bin, a, b in zip(measure.reliability(), low, high, strict=True)
        ]
    if predictions.kind == "binary" and mine is not None:
        found["roc"] = measure.roc()
    if of_classes is not None:
        found["of_classes"] = [
            figure(Interval(*(x[i] for x in of_classes)), "too few of a class", found["patients"])
            for i in range(len(predictions.classes))
        ]
    return found


def _drawn_from(name: str, group: Record) -> int:
    """Patients whose number decides whether a figure has an interval: the fewer of both classes."""
    if "positives" not in group or name in OF_ALL:
        return group["patients"]
    return min(group["patients_with"], group["patients_without"])


def figure(x: Interval, why: str, patients: int) -> Record:
    """A figure in plain values, without an interval below two patients.

    why: words in its place where there is none.
    """
    value = _plain(x.value)
    known = value is not None and patients > 1
    low, high = (_plain(x.low), _plain(x.high)) if known else (None, None)
    note = why if value is None else "" if low is not None else "too few for an interval"
    return {"value": value, "low": low, "high": high, "undefined": int(x.undefined), "note": note}


def missing(name: str, group: Record, measure: Any) -> str:
    """Words for why a group may have no such figure."""
    if "positives" not in group:
        return "one class only" if name == "auroc" else "no spread"
    if name in ("sensitivity",) or (name == "auprc" and not group["positives"]):
        return "no positives"
    if name == "specificity":
        return "no negatives"
    if name in ("precision", "negative_precision"):
        return "all are a no" if name == "precision" else "all are a yes"
    if not group["positives"]:
        return "no positives"
    if group["positives"] == group["rows"]:
        return "no negatives"
    return "classes apart" if len(measure.ranking.starts) > 1 else "one score for all"


def _warnings(predictions: Predictions, whole: Record) -> list[str]:
    found = []
    rows = len(predictions.truth)
    if predictions.unlabelled:
        found.append(f"{predictions.unlabelled:,} rows without a label were left out.")
    if predictions.duplicates:
        found.append(
            f"{predictions.duplicates:,} of {rows:,} rows repeat a patient and a time: each counts."
        )
    if predictions.unit == "rows":
        found.append(
            "The file has no subject_id: intervals are by row, and too narrow if a patient has "
            "several."
        )
    if predictions.kind == "binary":
        if predictions.scores is None:
            found.append("The file has decisions alone: nothing is known of ranks or calibration.")
        elif not predictions.calibrated:
            found.append(
                "Scores are beyond 0 to 1: they rank, but have no calibration and no Brier score."
            )
        for name, count in (
            ("with", whole["patients_with"]),
            ("without", whole["patients_without"]),
        ):
            if count < FEW:
                found.append(
                    f"{count} {predictions.unit} {name} the outcome: intervals of fewer than {FEW} "
                    "are rough, and mostly too narrow."
                )
        area = whole["figures"].get("auroc", {})
        if area.get("value") in (0.0, 1.0):
            found.append(
                "The classes are wholly apart, and so they are in every resample: the interval of "
                "AUROC cannot say how sure that is."
            )
    return found


def _plain(x: np.ndarray | float) -> float | None:
    value = float(x)
    return None if math.isnan(value) else value
