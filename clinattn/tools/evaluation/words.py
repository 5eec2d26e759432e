"""Names, meanings and sentences of an evaluation, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from clinattn.tools.evaluation.binary import DECISIONS

Record = dict[str, Any]

HANLEY = ("Hanley and McNeil, 1982", "https://doi.org/10.1148/radiology.143.1.7063747")
MANN = ("Mann and Whitney, 1947", "https://doi.org/10.1214/aoms/1177730491")
BRIER = ("Brier, 1950", "https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2")
COX = ("Cox, 1958", "https://doi.org/10.1093/biomet/45.3-4.562")
CALSTER = ("Van Calster et al., 2016", "https://doi.org/10.1016/j.jclinepi.2015.12.005")
EFRON = ("Efron, 1979", "https://doi.org/10.1214/aos/1176344552")
NAEINI = ("Naeini et al., 2015", "https://doi.org/10.1609/aaai.v29i1.9602")
DAVIS = ("Davis and Goadrich, 2006", "https://doi.org/10.1145/1143844.1143874")


class Figure(NamedTuple):
    """title: the head of a column. text: what it means, for readers who do not know it.

    sources: names and links.
    """

    title: str
    text: str
    sources: tuple[tuple[str, str], ...] = ()


FIGURES = {
    "auroc": Figure(
        "AUROC",
        "Of one row with the outcome and one without, the chance that the first has the higher "
        "score, ties counting half: 1 is perfect, 0.5 is a coin.",
        (MANN, HANLEY),
    ),
    "auprc": Figure(
        "AUPRC",
        "Average precision: how pure the top of the ranking is, on the mean over all with the "
        "outcome. A coin has the prevalence, so it can only be compared at the same prevalence.",
        (DAVIS,),
    ),
    "brier": Figure(
        "Brier score",
        "The mean squared distance of the probability from what happened (1 or 0): 0 is perfect. "
        "Ranking and calibration both count.",
        (BRIER,),
    ),
    "calibration_error": Figure(
        "Calibration error",
        "Rows are put in groups of equal size by their probability. It is the mean distance "
        "between probability and share observed in a group. With few rows it is above 0 even for a "
        "calibrated model.",
        (NAEINI,),
    ),
    "observed_over_expected": Figure(
        "Observed over expected",
        "Outcomes that happened over those that the probabilities add up to: 1 is right on the "
        "mean, above 1 the model says too little, below 1 too much.",
        (CALSTER,),
    ),
    "slope": Figure(
        "Calibration slope",
        "By logistic recalibration: 1 is right, below 1 the probabilities are too extreme, above 1 "
        "too timid.",
        (COX, CALSTER),
    ),
    "intercept": Figure(
        "Calibration intercept",
        "By logistic recalibration, beside the slope: 0 is right.",
        (COX, CALSTER),
    ),
    "sensitivity": Figure("Sensitivity", "Of those with the outcome, the share that are a yes."),
    "specificity": Figure("Specificity", "Of those without, the share that are a no."),
    "precision": Figure("Precision", "Of all that are a yes, the share with the outcome (PPV)."),
    "negative_precision": Figure("NPV", "Of all that are a no, the share without the outcome."),
    "accuracy": Figure("Accuracy", "The share of rows that are right."),
    "log_loss": Figure(
        "Log loss",
        "The mean of minus the logarithm of the probability that the true class was given: 0 is "
        "perfect.",
    ),
    "mae": Figure("MAE", "The mean distance between prediction and truth."),
    "rmse": Figure("RMSE", "The root of the mean squared distance: large errors count more."),
    "r2": Figure("R\u00b2", "The share of the spread that is predicted: 0 is as good as the mean."),
}
# The columns of groups and of the first table, in their order
MAIN = {
    "binary": (
        *("auroc", "auprc", "brier", "calibration_error"),
        *("observed_over_expected", "slope", "intercept"),
    ),
    "classes": ("auroc", "accuracy", "log_loss"),
    "numbers": ("mae", "rmse", "r2"),
}


def figures_of(record: Record) -> list[str]:
    """Names of the main figures that the record's groups have; decisions, where nothing else."""
    known = record["groups"][0]["figures"]
    return [name for name in MAIN[record["task"]] if name in known] or list(DECISIONS)


def number(x: float) -> str:
    """Three decimals, and of large or small numbers three digits."""
    return f"{x:.3f}" if 0.001 <= abs(x) < 1000 or x == 0 else f"{x:.3g}"


def value(figure: Record) -> str:
    """The figure, or the words in its place."""
    return figure["note"] if figure["value"] is None else number(figure["value"])


def interval(figure: Record) -> str:
    if figure["low"] is None:
        return "-" if figure["value"] is None else figure["note"]
    return f"{number(figure['low'])} to {number(figure['high'])}"


def both(figure: Record) -> str:
    """The figure with its interval, in a cell."""
    if figure["value"] is None or figure["low"] is None:
        return value(figure)
    return f"{value(figure)} ({interval(figure)})"


def several(count: int, unit: str) -> str:
    """unit: of many, such as rows."""
    return f"{count:,} {unit[:-1] if count == 1 else unit}"


def conclusion(record: Record) -> str:
    """Says in a sentence or three what follows from the figures."""
    whole = record["groups"][0]
    of = several(whole["rows"], "predictions")
    if record["unit"] == "patients":
        of += f" for {several(whole['patients'], 'patients')}"
    said = {"binary": _binary, "classes": _classes, "numbers": _numbers}[record["task"]](record)
    return f"{of}: {said}." + _of_groups(record)


def _binary(record: Record) -> str:
    whole = record["groups"][0]
    figures = whole["figures"]
    area = figures.get("auroc")
    if area is None:
        figure = figures["accuracy"]
        return f"{both(figure)} of the decisions are right"
    if area["value"] is None:
        return f"nothing can be said of ranks, {area['note']}"
    said = f"AUROC {both(area)}: {_against(area, 0.5, ('worse', 'better'))}"
    return f"{said}. {_calibration(figures)}" if record["calibrated"] else said


def _against(area: Record, chance: float, words: tuple[str, str]) -> str:
    if area["low"] is None:
        return "too few patients to tell it from chance"
    if area["low"] > chance:
        return f"{words[1]} than chance"
    if area["high"] < chance:
        return f"{words[0]} than chance"
    return "it cannot be told from chance"


def _calibration(figures: dict[str, Record]) -> str:
    ratio, slope = figures["observed_over_expected"], figures["slope"]
    if ratio["low"] is None:
        return "Too little is known of calibration"
    found = []
    if ratio["low"] > 1:
        found.append("too low on the mean")
    if ratio["high"] < 1:
        found.append("too high on the mean")
    if slope["low"] is not None and slope["high"] < 1:
        found.append("too extreme")
    if slope["low"] is not None and slope["low"] > 1:
        found.append("too timid")
    if not found and (slope["low"] is None or slope["low"] <= 0):
        return "These are too few patients to tell whether its probabilities are right"
    if not found:
        return "Mean and slope of its probabilities agree with what happened, within the intervals"
    return f"Its probabilities are {' and '.join(found)}"


def _classes(record: Record) -> str:
    whole = record["groups"][0]
    area, right = whole["figures"]["auroc"], whole["figures"]["accuracy"]
    base = whole["baseline"]["accuracy"]
    return (
        f"accuracy {both(right)}, where always the most frequent class has {number(base)}; mean "
        f"AUROC of the classes {both(area)}"
    )


def _numbers(record: Record) -> str:
    whole = record["groups"][0]
    off, share = whole["figures"]["mae"], whole["figures"]["r2"]
    base = whole["baseline"]["mae"]
    return (
        f"off by {both(off)} on the mean, where always the mean value is off by {number(base)}; "
        f"R\u00b2 {both(share)}"
    )


def _of_groups(record: Record) -> str:
    """Between which figures the groups of each column or code lie."""
    name = figures_of(record)[0]
    said = ""
    for by in record["by"]:
        found = [
            (group["figures"][name]["value"], group["name"])
            for group in record["groups"]
            if group["by"] == by and group["figures"][name]["value"] is not None
        ]
        if len(found) > 1:
            (low, least), (high, most) = min(found), max(found)
            lowest, highest = f"{number(low)} ({least})", f"{number(high)} ({most})"
            said += f" By {by}, {FIGURES[name].title} is from {lowest} to {highest}."
    return said


def threshold(record: Record) -> str:
    """Says from which probability on a row is a yes."""
    if record["threshold"] is None:
        return "The file's own decisions."
    return f"A yes is a probability of {record['threshold']:g} or more."


def facts(record: Record) -> dict[str, str]:
    """Facts on the origin of the numbers, by name; nested ones in one line."""
    found = {}
    for name, known in (*record["source"].items(), *record["environment"].items()):
        if known is not None and known != {}:
            found[str(name)] = _flat(known)
    found["resamples, seed"] = f"{record['resamples']:,}, {record['seed']}"
    return found


def _flat(known: Any) -> str:
    if isinstance(known, dict):
        return "; ".join(f"{name}: {_flat(x)}" for name, x in known.items() if x is not None)
    if isinstance(known, Sequence) and not isinstance(known, str):
        return ", ".join(map(_flat, known))
    return str(known)
