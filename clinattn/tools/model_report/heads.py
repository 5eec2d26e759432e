"""Classes with a head: the one that a configuration names, and batches for what it takes and gives.

A bare model gives hidden states, which example_inputs names. A head gives logits of tokens or of
sequences, under names of its own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from clinattn.tools.model_report.example_inputs import ExampleInputs

CHOICES = "ForMultipleChoice"


def named_class(config: Any) -> type[PreTrainedModel] | None:
    """The class of transformers that config.architectures names first; None where it names none."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def batch_for_class(model: PreTrainedModel, batch: ExampleInputs) -> ExampleInputs:
    """`batch` of a model's type with the inputs that its class takes and the outputs it gives.

    An output of tokens is compared at tokens alone, which its shape tells. Raises ValueError for a
    class that does not take the batch, or gives no tensor.
    """
    inputs = taken_by(model, batch.inputs)
    if type(model).__name__.endswith(CHOICES):
        inputs = {name: x[:, None] for name, x in inputs.items()}  # one choice
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = model(**inputs)
    if all(outputs.get(name) is not None for name in batch.real):
        return ExampleInputs(inputs, batch.real)
    masks = [mask for mask in batch.real.values() if mask is not None]
    real: dict[str, Tensor | None] = {
        name: next((mask for mask in masks if mask.shape == x.shape[:2]), None)
        for name, x in outputs.items()
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
    }
    if not real:
        raise ValueError(f"its outputs {', '.join(outputs)} hold nothing to compare")
    return ExampleInputs(inputs, real)


def taken_by(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that forward takes: an encoder alone takes none of a decoder."""
    parameters = inspect.signature(model.forward).parameters
    taken = {name: x for name, x in inputs.items() if name in parameters}
    if model.main_input_name not in taken:
        raise ValueError(f"takes {model.main_input_name}, expected one of {', '.join(inputs)}")
    return taken


@torch.no_grad()
def real_tokens(model: PreTrainedModel, batch: ExampleInputs) -> int:
    """Tokens, frames or patches that are no padding, of encoder and decoder.

    batch: of the model's type, not of its class.
    """
    masks = list(batch.real.values())
    if any(mask is None for mask in masks):
        body: Any = model.base_model
        outputs = body(**taken_by(body, batch.inputs))
        shapes = {name: outputs[name].shape[:-1] for name in batch.real}
        masks = [
            torch.ones(shapes[name]) if mask is None else mask for name, mask in batch.real.items()
        ]
    return sum(int(mask.sum()) for mask in masks if mask is not None)
