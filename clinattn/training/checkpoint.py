"""Checkpoints: written whole or not at all, the last few kept, read without running code."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clinattn.encoder import (
    CausalLanguageModel,
    Encoder,
    EncoderConfig,
    MaskedLanguageModel,
    PretrainingModel,
    SequenceClassifier,
)
from clinattn.files.disk import written_whole
from clinattn.files.shapes import ANYTHING, COUNT, NOTHING, NUMBER, TEXT, Each, Kind, Named, require

from .data import Corpus
from .regression import Regressor
from .settings import TrainingSettings
from .windows import FIRST

FORMAT = 3
REORDERED = 2  # the format of runs that took sequences in another order
UNSUMMED = 1  # the format before checksums
FORMATS = (FORMAT, REORDERED, UNSUMMED)
NAME = re.compile(r"step-(\d+)\.pt")
WEIGHT = Kind("a tensor", lambda x: isinstance(x, Tensor))
SCALES = Kind(
    "a mean and a scale", lambda x: isinstance(x, dict) and x.keys() == {"mean", "scale"}
)
# Settings of the loop of training, which say nothing of data or model.
OF_THE_LOOP = frozenset(
    {"batch_tokens", "accumulate", "steps", "lr", "warmup", "weight_decay", "clip", "dtype"}
)
PRIVACY = Named({"epsilon": NUMBER, "delta": NUMBER}, others=ANYTHING)
CONTENT = Named(
    {
        "format": COUNT,
        "step": COUNT,
        "epoch": COUNT,
        "place": COUNT,
        "model": Named({}, others=WEIGHT),
        # a setting is absent from checkpoints older than the setting, and has its default
        "settings": Named(
            {"task": TEXT, "preset": TEXT | NOTHING, "held_out": NUMBER},
            {field.name: ANYTHING for field in fields(TrainingSettings)},
            closed=True,
        ),
        "data": TEXT,
        "config": Named({}),
        "tokens": Each(TEXT),
        "classes": Each(TEXT),
    },
    {
        # one of the two: moments are in the file, or by file and checksum in shards beside it
        "optimiser": Named({"state": Named({}), "param_groups": Each(Named({}))}, closed=True),
        "shards": Named({}, others=TEXT),
        "standard": SCALES | NOTHING,
        "sha256": TEXT,
        "split": Named({"by": TEXT}, others=TEXT),
        "tokenizer": TEXT | NOTHING,
        "architecture": TEXT,
        "target": Named(
            {"column": TEXT, "mean": NUMBER | NOTHING, "scale": NUMBER | NOTHING}, closed=True
        ),
        "privacy": PRIVACY,
    },
    closed=True,
)


class Damaged(ValueError):
    """A file that is no whole checkpoint; the message names it."""


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in the folder, oldest first."""
    found = [
        (int(m[1]), path) for path in folder.glob("step-*.pt") if (m := NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def shards_of(path: Path) -> Path:
    """The folder beside a checkpoint that has the moments of a model in shards."""
    return path.with_suffix(".shards")


def content_of(
    settings: TrainingSettings,
    corpus: Corpus,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
) -> dict[str, Any]:
    """Returns what save_checkpoint takes, for a model trained on `corpus` by any loop.

    model: of the class that load_model makes for the task of the settings, of any shape. Of the
    settings, those of the loop are left out. Training with differential privacy adds the key
    privacy: a dict of epsilon, delta and other facts.
    """
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    standard, target = corpus.standard, corpus.target
    return {
        "step": step,
        "epoch": 0,
        "place": 0,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "settings": {k: x for k, x in settings.maths().items() if k not in OF_THE_LOOP},
        "data": corpus.fingerprint,
        "config": asdict(encoder.config),
        "tokens": corpus.tokens,
        "classes": corpus.classes,
        "standard": None if standard is None else vars(standard),
        "split": corpus.split,
        "tokenizer": corpus.tokenizer,
        "architecture": settings.preset or "own shape",
        **({} if target is None else {"target": vars(target)}),
    }


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write step-<step>.pt with its checksum, then remove those before it but the last `keep`."""
    path = checkpoint_path(folder, state["step"])
    content = state | {"format": FORMAT}
    with written_whole(path) as partial, partial.open("wb") as file:
        try:
            torch.save(content | {"sha256": checksum(content)}, file)
        except RuntimeError as error:  # torch's, in place of what the file said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    found = checkpoints(folder)
    for old in found[: found.index(path) + 1][:-keep]:
        old.unlink()
    for shards in folder.glob("step-*.shards"):
        if not shards.with_suffix(".pt").exists():
            shutil.rmtree(shards)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint to the CPU, as it was saved.

    Raises ValueError for a file that cannot be read, Damaged for what is no checkpoint of this
    format, has another checksum, or a weight that is not finite.
    """
    where = f"checkpoint {str(path)!r}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None
    except Exception:  # of pickle, zip and torch, as the damage may be
        raise Damaged(
            f"{where} cannot be read: it is damaged, or none of clinattn train"
        ) from None
    if not isinstance(state, dict) or state.get("format") not in FORMATS:
        raise Damaged(f"{where}: expected one of clinattn train, format {FORMAT}")
    try:
        require(state, CONTENT)
        if ("optimiser" in state) == ("shards" in state):
            raise ValueError("expected one of optimiser and shards")
        EncoderConfig(**state["config"])
    except (ValueError, TypeError) as error:
        raise Damaged(f"{where}: {error}") from None
    found = state.pop("sha256", None)
    if state["format"] != UNSUMMED and found != checksum(state):
        raise Damaged(f"{where} is damaged: its checksum is not that of its contents")
    made_by = state["settings"]
    if made_by["task"] == "classify" and made_by.get("label_code") is None:
        made_by.setdefault("pool", FIRST)  # before windows of a text, the first alone was read
    for name, weight in state["model"].items():
        if not weight.isfinite().all():
            raise Damaged(f"{where}: weight {name!r} has NaN or infinity: expected finite numbers")
    return state


def newest_intact(
    found: list[Path],
    where: str,
    load: Callable[[Path], dict[str, Any]] = load_checkpoint,
) -> tuple[Path, dict[str, Any], tuple[str, ...]]:
    """The newest intact of these checkpoints, its contents, and what damaged the ones after it.

    found: oldest first. load: raises Damaged. Raises ValueError where none is intact.
    """
    damaged: list[str] = []
    for path in reversed(found):
        try:
            return path, load(path), tuple(damaged)
        except Damaged as error:
            damaged.append(str(error))
    raise ValueError(f"{where} holds no checkpoint that is intact: {'; '.join(damaged)}")


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 of tensors and plain values, by name and in order, however a file holds them."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)}".encode())
            for name, own in value.items():
                take(name)
                take(own)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)}".encode())
            for own in value:
                take(own)
        else:
            text = repr(value).encode()
            digest.update(b"%d %b" % (len(text), text))

    take(content)
    return digest.hexdigest()


def take_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads weights into model. Raises ValueError, in one line, where names or shapes differ."""
    check_weights(model, weights, where)
    model.load_state_dict(weights)


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError, in one line, where names or shapes are not those of the model."""
    own = model.state_dict()
    differ = [
        f"{name} {'missing' if theirs is None else 'unknown' if ours is None else theirs}"
        for name in sorted(own.keys() | weights.keys())
        for ours, theirs in [(_shape(own.get(name)), _shape(weights.get(name)))]
        if ours != theirs
    ]
    if differ:
        raise ValueError(
            f"{where}: {len(differ)} weights are not those of the model, first {differ[0]}"
        )


def _shape(weight: Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else tuple(weight.shape)


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model, in eval mode, and the checkpoint: tokens, classes, settings, step.

    Where its config has numeric_values, Standard(**checkpoint["standard"]) of standard.py puts
    values on the scale that the model was trained on.
    """
    state = load_checkpoint(Path(path))
    return model_of(state, f"checkpoint {str(path)!r}"), state


def model_of(state: dict[str, Any], where: str) -> nn.Module:
    """The model of a checkpoint's contents, in eval mode. where: of the file, for messages."""
    config = EncoderConfig(**state["config"])
    model: nn.Module
    match state["settings"]["task"]:
        case "classify" if state["classes"]:
            model = SequenceClassifier(config, len(state["classes"]))
        case "classify":
            model = Regressor(config)
        case "clm":
            model = CausalLanguageModel(config)
        case _ if state["settings"].get("nsp"):
            model = PretrainingModel(config)
        case _:
            model = MaskedLanguageModel(config)
    take_weights(model, state["model"], where)
    return model.eval()
