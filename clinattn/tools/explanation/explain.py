"""From settings to the record of an explanation, in plain values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from clinattn.tools.explanation.case import Case, Progress
from clinattn.tools.explanation.deletion import deletion
from clinattn.tools.explanation.note import read_note
from clinattn.tools.explanation.scores import overlap, rank_correlation, ranked, shares
from clinattn.tools.explanation.settings import METHODS, ExplainSettings
from clinattn.training.origin import resolve, sha256

READ_ATTENTION = ("attingrad", "relevance", "rollout")


def read_case(settings: ExplainSettings) -> Case:
    """The case that the settings name. Raises ValueError for bad input."""
    text = None if settings.text is None else read_note(settings.text, settings.encoding)
    origin = resolve(settings.checkpoint)
    if origin.saved is None:
        from clinattn.tools.explanation.pretrained import read_folder

        case = read_folder(settings, text)
    else:
        from clinattn.tools.explanation.trained import read_checkpoint

        case = read_checkpoint(settings, origin.path, origin.saved, text)
    if settings.target is not None and settings.target not in case.model.classes:
        raise ValueError(f"target={settings.target!r}: expected one of {list(case.model.classes)}")
    why_not = case.model.without_attention()
    for method in settings.methods:
        if why_not and method in READ_ATTENTION:
            raise ValueError(f"method={method!r} reads attention, and {why_not}: expected another")
    return replace(case, checkpoint=sha256(origin))


def explained(case: Case, settings: ExplainSettings, progress: Progress) -> dict[str, Any]:
    """The record: probabilities, scores of every unit and visit, agreement, and deletion curves."""
    steps = 1 + len(settings.methods)
    progress("predict", 0, steps)
    everything = torch.arange(len(case.of_token))
    probabilities = case.probabilities(case.model.logits([everything]))[0].tolist()
    classes = case.model.classes
    target = (
        max(range(len(classes)), key=lambda i: (probabilities[i], -i))
        if settings.target is None
        else classes.index(settings.target)
    )
    scores = {}
    for i, method in enumerate(settings.methods):
        progress(f"{METHODS[method].title}: {len(case.of_token):,} tokens", 1 + i, steps)
        scores[method] = shares(case, target, method)
    one, other = scores.values()
    top = min(settings.top, len(case.units))
    first, second = (ranked(x)[:top] for x in (one, other))
    return {
        "kind": "explanation",
        "checkpoint": case.checkpoint,
        "title": case.title,
        "unit": case.unit,
        "predicted": case.predicted,
        "facts": dict(case.facts),
        "warnings": list(case.warnings),
        "classes": dict(zip(classes, probabilities, strict=True)),
        "independent": case.model.independent,
        "target": classes[target],
        "target_given": settings.target is not None,
        "probability": probabilities[target],
        "methods": list(settings.methods),
        "units": [
            {
                "name": unit.name,
                "value": unit.value,
                "description": unit.description,
                "time": unit.when,
                "group": unit.group,
                "known": unit.known,
                "scores": [x[i] for x in scores.values()],
            }
            for i, unit in enumerate(case.units)
        ],
        # those of the first method, then others of the second
        "strongest": [*first, *(i for i in second if i not in first)],
        "groups": [
            {
                "title": group.title,
                "first": group.first,
                "last": group.last,
                "units": sum(unit.group == i for unit in case.units),
                "scores": [
                    sum(x for x, unit in zip(row, case.units, strict=True) if unit.group == i)
                    for row in scores.values()
                ],
            }
            for i, group in enumerate(case.groups)
        ],
        "agreement": {
            "top": top,
            "shared": overlap(one, other, top),
            "rank_correlation": rank_correlation(one, other),
        },
        "deletion": deletion(case, target, scores, settings.draws, settings.seed, progress),
    }
