"""A model of transformers from a folder, a configuration or the name of its type; no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from clinattn.tools.model_report.architectures import (
    ARCHITECTURES,
    EITHER_SIDE,
    Architecture,
    spread_weights,
    with_dropout,
)
from clinattn.tools.model_report.example_inputs import text, text_to_text
from clinattn.tools.model_report.heads import named_class

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def load_model(source: str, full_size: bool = False) -> tuple[PreTrainedModel, str]:
    """The model, in evaluation mode and fp32, and in words where its weights come from.

    source: a folder with config.json, and weights or none, or a config.json: the class is the first
    of transformers that `architectures` there names, with its head, else that of the type. Or a
    model type such as bert, at a size for tests, or with full_size at that of its default
    configuration. Without weights they are random, large enough that attention is no plain average,
    and without dropout.
    Raises ValueError for anything else. Nothing is downloaded.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source}: this folder has no config.json")
        if any(any(path.glob(pattern)) for pattern in WEIGHTS):
            config = read_config(source, path)
            load = lambda: (named_class(config) or AutoModel).from_pretrained(
                path, local_files_only=True, trust_remote_code=False, dtype=torch.float32
            )
            model = first_line_of_errors(source, load).eval()
            return model, f"the weights in {source}{without_head(config)}"
        path /= "config.json"
    if path.is_file():
        config = read_config(source, path)
        model = random_model(source, config)
        return model, f"random weights for {path}{without_head(config)}"
    name = source.replace("-", "_")
    if not full_size:
        for architecture in ARCHITECTURES:
            if architecture.name.replace("-", "_") == name and architecture.available():
                model = random_model(source, architecture.config())
                return model, f"random weights, {architecture.model} at a size for tests"
    for model_type in (source, name, source.replace("_", "-")):
        if model_type in CONFIG_MAPPING:
            config = first_line_of_errors(source, CONFIG_MAPPING[model_type])
            return random_model(source, config), f"random weights, the default {model_type}"
    raise ValueError(
        f"{source}: there is no such folder or file, and transformers {transformers.__version__} "
        "has no such model type; expected a folder with config.json, a config.json, or a type "
        "such as bert (nothing is downloaded)"
    )


def read_config(source: str, path: Path) -> Any:
    load = lambda: AutoConfig.from_pretrained(path, trust_remote_code=False)
    return first_line_of_errors(source, load)


def without_head(config: Any) -> str:
    """Words for a class that transformers does not have, whose type is loaded without a head."""
    names = getattr(config, "architectures", None)
    if not names or named_class(config) is not None:
        return ""
    return f", without the head of {names[0]}, which is no class of transformers"


def random_model(source: str, config: Any) -> PreTrainedModel:
    with_dropout(config, 0.0)
    named = named_class(config)
    build = AutoModel.from_config if named is None else named._from_config
    model = first_line_of_errors(source, lambda: build(config))
    if architecture_of(model).spread:
        spread_weights(model)
    return model.eval()


def first_line_of_errors(source: str, load: Callable[[], Any]) -> Any:
    """ValueError with one line, whatever transformers and safetensors raise for a broken file."""
    try:
        return load()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{source}: {reason}") from error


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Architecture by which inputs for a model are made: that of its type, or one of text.

    Raises ValueError for a model that takes neither.
    """
    model_type, kind = model.config.model_type, type(model).__name__
    for architecture in ARCHITECTURES:
        if architecture.name == model_type:
            return architecture
    if model.main_input_name != "input_ids" or not hasattr(model.config, "vocab_size"):
        known = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise ValueError(
            f"{kind}: takes {model.main_input_name}, which nothing here makes for the model type "
            f"{model_type}; it does for text, and for {known}"
        )
    batch = text_to_text if model.config.is_encoder_decoder else text
    return Architecture(model_type, kind, {}, batch=batch, paddings=EITHER_SIDE)
