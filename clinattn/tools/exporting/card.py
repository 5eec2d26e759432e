"""The card of an exported model, in Markdown, with front matter as Hugging Face reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from clinattn.encoder.families import OWN, Family
from clinattn.tools.environment import environment
from clinattn.tools.evaluation.printed import counts, rows_of_figures, titles
from clinattn.tools.evaluation.words import FIGURES, both, conclusion, figures_of, threshold
from clinattn.tools.exporting.metrics import read_metrics
from clinattn.tools.exporting.model import Exported
from clinattn.tools.exporting.settings import ExportSettings

TASKS = {
    "classifier": "classifies a sequence",
    "masked": "predicts masked tokens of a sequence",
    "causal": "predicts the next token of a sequence",
}
AUTO = {"classifier": "AutoModelForSequenceClassification", "masked": "AutoModelForMaskedLM"}
FILES = {
    "config.json": "the shape of the model, and names of classes",
    "model.safetensors": "the weights",
    "vocabulary.json": "codes or words of the training split, and their ids",
    "clinattn.json": "settings of training, classes, and means and scales of values by code",
    "tokenizer.json": "the tokenizer of texts",
    "tokenizer_config.json": "the class that reads the tokenizer",
}


def card(
    model: Exported,
    settings: ExportSettings,
    family: Family,
    why: str,
    evaluation: dict[str, Any] | None,
    files: Sequence[str],
) -> str:
    """The text of README.md. why: transformers has no such model type. files: of the folder."""
    parts = [
        _front(model, family),
        *_purpose(model),
        *_use(model, settings, family, why),
        *_data(model, settings),
        *_results(model, evaluation),
        *_made(model, files),
    ]
    return "\n\n".join(parts) + "\n"


def _front(model: Exported, family: Family) -> str:
    lines = ["---", f"library_name: {'clinattn' if family is OWN else 'transformers'}"]
    lines += ["tags:", "- clinattn", "- medical", "---"]
    return "\n".join(lines)


def _purpose(model: Exported) -> Iterator[str]:
    saved = model.saved
    assert saved is not None
    trained = saved["settings"]
    yield f"# A clinattn model of preset {cell(trained['preset'])}, step {saved['step']:,}"
    said = (
        f"The model {TASKS[model.module.task]} of at most {trained.get('max_tokens', '?')} tokens."
    )
    if model.module.task == "classifier":
        if saved["classes"]:
            said += " Its classes: " + ", ".join(map(span, saved["classes"])) + "."
        else:
            said += " It predicts a number, on the scale that `clinattn.json` has as target."
    if trained.get("label_code") is not None:
        said += (
            f" The class says whether a code {span(trained['label_code'])} follows the part of "
            "the timeline that the model reads."
        )
    yield said
    yield "## What it must not be used for"
    yield (
        "The model has been through no clinical study. It must not decide on a person's care, nor "
        "be used where its mistakes reach patients without a clinician who judges by other "
        "evidence. "
        "Its figures hold for the data below: other hospitals, years, codes and patients need an "
        "evaluation of their own. A prediction is no cause."
    )


def _use(model: Exported, settings: ExportSettings, family: Family, why: str) -> Iterator[str]:
    yield "## How to load it"
    kind = model.kind.__name__
    assert settings.output is not None
    folder = json.dumps(settings.output.name)
    ours = f"from clinattn.encoder import {kind}\nmodel = {kind}.from_pretrained({folder})"
    if family is OWN:
        yield _code(ours)
        yield f"transformers cannot load this folder: {why}."
    else:
        auto = AUTO[model.module.task]
        yield _code(f"from transformers import {auto}\nmodel = {auto}.from_pretrained({folder})")
        yield "or, with clinattn's kernels and packed sequences,"
        yield _code(ours)
    if model.saved is not None and model.saved.get("tokenizer"):
        yield "Texts are read by the tokenizer of this folder, with its special tokens around them."
    else:
        yield (
            "A sequence begins with `[CLS]`; ids are those of `vocabulary.json`, and what is not "
            "in it is `[UNK]`."
        )
    asks = []
    if model.config.positions == "rotary_time":
        asks.append("positions: the days of each token since the first")
    if model.config.numeric_values:
        asks.append("values: of each token, by the means and scales of `clinattn.json`")
    if asks:
        yield "The model also asks for " + "; ".join(asks) + "."


def _data(model: Exported, settings: ExportSettings) -> Iterator[str]:
    saved = model.saved
    assert saved is not None
    trained = saved["settings"]
    yield "## Data"
    rows = {
        "data": settings.data_title or "not named (clinattn export --data-title)",
        "fingerprint of the training sequences": saved["data"],
        "held out, where the data list no splits": f"{trained['held_out']:.0%} of the patients",
        "tokens in the vocabulary": f"{len(saved['tokens']):,}",
        "a code or word needs": f"{trained.get('min_count', '?')} events in the training split",
    }
    yield _table(("fact", "value"), list(rows.items()))
    yield (
        "This folder has no patient's record. Vocabulary, classes and weights are aggregates of "
        "the training split; a rare code, or the mean of a code that had one value, may still tell "
        "of a person, and weights can remember what they were trained on: ask the owner of the "
        "data before you pass the folder on. No code was dropped from the vocabulary for this "
        "export."
    )
    privacy = saved.get("privacy")
    if privacy is not None:
        shown = {k: f"{x:.3g}" if isinstance(x, float) else cell(x) for k, x in privacy.items()}
        epsilon = shown.pop("epsilon")
        facts = ", ".join(f"{name} {x}" for name, x in shown.items())
        yield (
            f"The weights were trained with differential privacy: epsilon {epsilon} "
            f"({facts}). It does not cover the vocabulary, which has codes as they are."
        )


def _results(model: Exported, evaluation: dict[str, Any] | None) -> Iterator[str]:
    saved = model.saved
    assert saved is not None
    yield "## Results"
    metrics = read_metrics(model.path, saved["step"])
    if metrics:
        split, step = metrics.pop("split", "held_out"), metrics.pop("step", saved["step"])
        rows = [(name, f"{x:.4g}") for name, x in metrics.items() if isinstance(x, (int, float))]
        yield f"While training, on the split {span(split)} at step {step:,}, by `metrics.jsonl`:"
        yield _table(("figure", "value"), rows)
    if evaluation is not None:
        said = cell(conclusion(evaluation))
        yield f"By `clinattn evaluate`, on {cell(_split(evaluation))}: {said}"
        yield _table(("figure", *titles(evaluation)), list(rows_of_figures(evaluation)))
        if evaluation["task"] == "binary":
            yield threshold(evaluation)
        if evaluation["by"]:
            yield _groups(evaluation)
    if not metrics and evaluation is None:
        yield "None are known: no `metrics.jsonl` lay beside the checkpoint."


def _split(evaluation: dict[str, Any]) -> str:
    source = evaluation["source"]
    return f"the split {source['split']}" if source.get("split") else f"the file {source['file']}"


def _groups(evaluation: dict[str, Any]) -> str:
    names = figures_of(evaluation)[:4]
    head = ("by", "group", *counts(evaluation, evaluation["groups"][0]))
    rows = [
        (
            group["by"] or "",
            group["name"],
            *counts(evaluation, group).values(),
            *(both(group["figures"][name]) for name in names),
        )
        for group in evaluation["groups"]
    ]
    return _table((*head, *(FIGURES[name].title for name in names)), rows)


def _made(model: Exported, files: Sequence[str]) -> Iterator[str]:
    saved = model.saved
    assert saved is not None
    yield "## How it was made"
    weights = sum(p.numel() for p in model.module.parameters())
    settings = {k: x for k, x in saved["settings"].items() if x is not None}
    facts = environment()
    rows = {
        "checkpoint": model.path.name,
        "weights": f"{weights:,}",
        "settings of training": ", ".join(f"{k} {x}" for k, x in settings.items()),
        "exported": facts["date"][:10],
        "versions": f"clinattn {facts['clinattn']}, torch {facts['torch']}",
        "hardware of this export": facts["gpu"] or facts["cpu"],
    }
    yield _table(("fact", "value"), list(rows.items()))
    yield "\n".join(f"- `{name}`: {FILES.get(name, 'a file')}" for name in files)
    if model.notes:
        yield "\n".join(f"- {cell(note)}" for note in model.notes)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(x) for x in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def span(text: Any) -> str:
    """A name of a code or class as it is."""
    return "`" + " ".join(str(text).split()).replace("`", "'") + "`"


def cell(text: Any) -> str:
    """Escapes a name of a code or a class, which is any text, for one line of Markdown."""
    flat = " ".join(str(text).split()).replace("\\", "\\\\")
    for mark in "|`<>[]*_":
        flat = flat.replace(mark, f"\\{mark}")
    return flat
