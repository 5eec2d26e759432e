"""Models of transformers that ask its registry of attention functions, switched to clinattn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from clinattn.integrations.outcome import Outcome
from clinattn.integrations.transformers.masks import ADDED
from clinattn.integrations.transformers.registry import NAME, register
from clinattn.integrations.unsupported import uses_registry


def switch(model: nn.Module) -> Callable[[], None]:
    """Selects clinattn in every transformers model within model; returns what undoes it."""
    register()
    models = [
        x
        for x in model.modules()
        if isinstance(x, PreTrainedModel) and x.config.model_type not in ADDED
    ]
    before = [(x.config, x.config._attn_implementation) for x in models]
    with _unlogged():  # of those that cannot be switched, adapt says so
        for x in models:
            x.set_attn_implementation(NAME)

    def undo() -> None:
        for config, implementation in before:
            config._attn_implementation_internal = implementation

    return undo


@contextmanager
def _unlogged() -> Iterator[None]:
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def adapt(module: nn.Module) -> Outcome | None:
    """Outcome of switch for a module that asks the registry; None for other modules."""
    config = getattr(module, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if chosen is None or isinstance(module, PreTrainedModel) or not uses_registry(module):
        return None
    if chosen == NAME:
        return Outcome(True, f"attn_implementation={NAME!r}")
    model_type = getattr(config, "model_type", "")
    if model_type in ADDED:
        return Outcome(False, ADDED[model_type])
    return Outcome(False, f"transformers kept attn_implementation={chosen!r} for its model")


def restore(module: nn.Module) -> bool:
    """Returns False: the function that switch returned undoes all of a model."""
    return False
