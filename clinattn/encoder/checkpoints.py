"""Models from and to folders as transformers writes them: config.json and a file of tensors.

Local folders only: nothing is ever downloaded. families.py knows the model types.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from clinattn.files.disk import parse_json, write_text, written_whole
from clinattn.files.shapes import TEXT, Named, require

from .config import EncoderConfig
from .families import Family, family_for, family_of
from .tensor_files import TensorFile, opened, safetensors_module

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"

# Tensors that another head or an older transformers has, and that no encoder here computes with.
UNUSED = re.compile(
    r"(pooler|cls|classifier|lm_head|head|decoder|qa_outputs)\..*"
    r"|.*\.(position_ids|token_type_ids|inv_freq)"
)


TIED = ("masked", "causal")  # tasks whose decoder is the embedding


class Pretrained(nn.Module):
    """A model in a folder, as transformers has it too. task: which of a family's classes it is."""

    task: str

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **overrides: Any) -> Self:
        """The model of a local folder that transformers' save_pretrained has written.

        folder: config.json of model type bert, roberta, longformer, megatron-bert or modernbert,
        with model.safetensors or, without it, pytorch_model.bin, whose pickle runs no code; or
        with the shards that <name>.index.json names. Tensors of other heads are left out; those
        of a head that the folder lacks stay as they were drawn, with a warning that names them.
        Longformer's first token is its global one. In training a classifier drops out once, where
        RoBERTa's does before its dense layer too.
        overrides: fields of EncoderConfig, such as attention="sdpa".
        Raises FileNotFoundError or ValueError for a folder that is no such model, ImportError
        without safetensors.
        """
        return load(cls, folder, overrides)

    def save_pretrained(
        self, folder: str | os.PathLike[str], labels: Sequence[str] | None = None
    ) -> None:
        """Write config.json and model.safetensors, which transformers' from_pretrained loads.

        labels: names of a classifier's classes, default LABEL_0, LABEL_1 and so on.

        The special tokens of a tokenizer are not known here and written as null, but for the
        padding id that RoBERTa's positions follow.
        Raises ValueError for a shape that no model type of transformers has.
        """
        save(self, folder, labels)


def load(
    kind: type[Any],
    folder: str | os.PathLike[str],
    overrides: dict[str, Any],
    num_labels: int | None = None,
) -> Any:
    path, config, checkpoint = _opened(folder, kind.task)
    config = replace(config, **overrides)
    arguments: list[Any] = [config]
    if kind.task == "classifier":
        arguments.append(_num_labels(checkpoint, num_labels))
    with torch.device("meta"):
        expected = kind(*arguments).state_dict()
    new = checkpoint.check(kind.task, expected)
    model = kind(*arguments)
    _fill(model, checkpoint, set(_stored(kind.task, expected)) - set(new))
    if new:
        warnings.warn(
            f"{path} has no tensors for {', '.join(new)}: they are new, and drawn at random",
            stacklevel=3,
        )
    return model


def config_of(folder: str | os.PathLike[str]) -> tuple[EncoderConfig, str]:
    """The encoder of a folder, and its model type. Raises as from_pretrained does."""
    path = Path(folder)
    settings = _read_json(path / "config.json")
    family = family_of(settings)
    return _config(path, family, settings), family.model_type


def take_pretrained(model: Pretrained, folder: str | os.PathLike[str]) -> list[str]:
    """Loads the weights of a folder, as from_pretrained, into a model of its config.

    A classifier's last layer stays as it was drawn: its classes are others. Returns the names of
    the other tensors that the folder lacks, which stay as well.
    """
    checkpoint = _opened(folder, model.task)[2]
    state = model.state_dict()
    expected = {name: x for name, x in state.items() if not name.startswith("classifier.")}
    new = checkpoint.check(model.task, expected)
    _fill(model, checkpoint, set(_stored(model.task, expected)) - set(new))
    return new


def _opened(
    folder: str | os.PathLike[str], task: str
) -> tuple[Path, EncoderConfig, Checkpoint]:
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a local folder; nothing is downloaded")
    settings = _read_json(path / "config.json")
    family = family_of(settings)
    config = _config(path, family, settings)
    if task in TIED and not settings.get("tie_word_embeddings", True):
        raise ValueError("config.json: tie_word_embeddings=False: expected True")
    return path, config, Checkpoint(path, family)


def _fill(model: Pretrained, checkpoint: Checkpoint, names: set[str]) -> None:
    """Loads the tensors of these names, ours."""
    state = model.state_dict()
    for ours in names:
        state[ours] = checkpoint.tensor(model.task, ours)
    if model.task in TIED:
        state["decoder.weight"] = state["encoder.embeddings.tokens.weight"]
    model.load_state_dict(state)


def _config(path: Path, family: Family, settings: dict[str, Any]) -> EncoderConfig:
    try:
        return family.read(settings)
    except KeyError as missing:
        raise ValueError(f"{path / 'config.json'}: expected {missing}") from None


def save(
    model: Pretrained,
    folder: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    family: Family | None = None,
) -> None:
    """Writes a folder as save_pretrained does.

    family: None takes the one of transformers that has this shape.
    """
    save_file = safetensors_module("safetensors.torch").save_file
    encoder: Any = model if model.task == "encoder" else model.encoder
    config, task = encoder.config, model.task
    family = family or family_for(config, task)
    settings = family.write(config) | {
        "model_type": family.model_type,
        "architectures": [family.classes[task]],
        "tie_word_embeddings": True,
    }
    state = model.state_dict()
    if task == "classifier":
        count = len(state["classifier.weight"])
        labels = [f"LABEL_{i}" for i in range(count)] if labels is None else labels
        if len(set(labels)) != count:
            raise ValueError(f"labels={labels}: expected {count} different ones")
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    tensors = {}
    for ours in _stored(task, state):
        names = _their_names(family, task, ours)
        for name, part in zip(names, state[ours].chunk(len(names)), strict=True):
            tensors[name] = part.clone(memory_format=torch.contiguous_format)
    settings["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with written_whole(path / WEIGHTS) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    write_text(path / "config.json", json.dumps(settings, indent=2) + "\n")


def _stored(task: str, state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors of a model that a file holds: all but the tied decoder."""
    return [name for name in state if task not in TIED or name != "decoder.weight"]


def _their_names(family: Family, task: str, ours: str) -> tuple[str, ...]:
    if task == "encoder":
        return family.names(ours)
    if ours.startswith("encoder."):
        return tuple(family.prefix + x for x in family.names(ours.removeprefix("encoder.")))
    return family.head_names(task, ours)


class Checkpoint:
    """The tensors of a folder, under their names without the family's prefix."""

    def __init__(self, path: Path, family: Family):
        self.path, self.family = path, family
        self.files: dict[str, tuple[TensorFile, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, names in self._shards().items():
            tensors = opened(file)
            held = tensors.shapes()
            if names - held.keys():
                raise ValueError(f"{file}: expected the tensors {sorted(names - held.keys())}")
            for name in sorted(names or held):
                self.files[self._plain(name)] = tensors, name
                self.shapes[self._plain(name)] = held[name]

    def _shards(self) -> dict[Path, set[str]]:
        """Files and what an index says is in them, an empty set for all there is."""
        for name in (WEIGHTS, PICKLE):
            whole, index = self.path / name, self.path / f"{name}.index.json"
            if whole.is_file():
                return {whole: set()}
            if index.is_file():
                return self._indexed(index)
        raise FileNotFoundError(
            f"{self.path}: expected {WEIGHTS} or {PICKLE}, or an index of either"
        )

    def _indexed(self, path: Path) -> dict[Path, set[str]]:
        shards: dict[Path, set[str]] = {}
        index = _read_json(path)
        require(index, Named({"weight_map": Named({}, others=TEXT)}), str(path))
        for name, file in index["weight_map"].items():
            if Path(file).name != file or not (self.path / file).is_file():
                raise FileNotFoundError(f"{path}: {file!r} is no file beside it")
            shards.setdefault(self.path / file, set()).add(name)
        return shards

    def _plain(self, name: str) -> str:
        """Without prefix, and a norm's gain and bias as they are called since TensorFlow's BERT."""
        name = name.removeprefix(self.family.prefix)
        return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))

    def _names(self, task: str, ours: str) -> list[str]:
        names = _their_names(self.family, task, ours)
        return [name.removeprefix(self.family.prefix) for name in names]

    def check(self, task: str, expected: dict[str, Tensor]) -> list[str]:
        """Raise for what is missing, too much or of another shape; returns the new head's names."""
        missing, wrong, used, new = [], [], {self.family.tied}, []
        for ours in _stored(task, expected):
            names = self._names(task, ours)
            used.update(names)
            absent = [name for name in names if name not in self.shapes]
            if absent and task != "encoder" and not ours.startswith("encoder."):
                new.append(ours)
                continue
            missing += absent
            first, *rest = expected[ours].shape
            shape = (first // len(names), *rest)
            wrong += [
                f"{name} {self.shapes[name]} (expected {shape})"
                for name in names
                if self.shapes.get(name, shape) != shape
            ]
        unexpected = [x for x in self.shapes if x not in used and not UNUSED.fullmatch(x)]
        problems = {"missing": missing, "of another shape": wrong, "unexpected": unexpected}
        if any(problems.values()):
            found = [f"{what}: {_shortened(x)}" for what, x in problems.items() if x]
            raise ValueError(f"{self.path}: tensors {'; '.join(found)}")
        if task in TIED:
            self._check_tied()
        return new

    def _check_tied(self) -> None:
        tied, (embedding,) = self.family.tied, self.family.names("embeddings.tokens.weight")
        if tied in self.shapes and not torch.equal(self._read(tied), self._read(embedding)):
            raise ValueError(
                f"{self.path}: {tied} differs from {embedding}, expected a decoder that shares it"
            )

    def tensor(self, task: str, ours: str) -> Tensor:
        return torch.cat([self._read(name) for name in self._names(task, ours)])

    def _read(self, plain: str) -> Tensor:
        file, name = self.files[plain]
        return file.tensor(name)


def _shortened(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def _num_labels(checkpoint: Checkpoint, given: int | None) -> int:
    (name,) = checkpoint._names("classifier", "classifier.weight")
    if name in checkpoint.shapes:
        found = checkpoint.shapes[name][0]
        if given not in (None, found):
            raise ValueError(f"num_labels={given}: {checkpoint.path} has a classifier of {found}")
        return found
    if given is None:
        raise ValueError(f"{checkpoint.path} has no classifier: expected num_labels")
    return given


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        found = parse_json(path.read_bytes())
        require(found, Named({}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found
