"""A module's class exchanged in place for one with the same parameters and another forward."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from importlib.metadata import version

from torch import nn

from clinattn.integrations.outcome import Outcome

MAX_HEAD_DIM = 256


def swap(
    module: nn.Module, replacements: Mapping[type, type], parameters: tuple[str, ...], detail: str
) -> Outcome | None:
    """Give module the class that replaces its own; None where none does.

    replacements: original class -> its subclass. The subclass has the name of the original, which
    device maps and wrapping policies look for. parameters: those of the forward that the subclasses
    were written for; another release may have others. A second swap changes nothing.
    """
    original = type(module)
    if original in replacements.values():
        return Outcome(True, detail)
    if original not in replacements:
        if isinstance(module, tuple(replacements)):
            return Outcome(False, f"{original.__qualname__} is a subclass with its own code")
        return None
    if "forward" in vars(module):  # an instance's own, as accelerate's hooks set, hides the class's
        return Outcome(False, "its forward was overridden on the instance; replace attention first")
    found = tuple(inspect.signature(original.forward).parameters)[1:]
    if found != parameters:
        return Outcome(
            False,
            f"forward{found} of transformers {version('transformers')}, expected {parameters}",
        )
    head_dim = getattr(module, "head_dim", getattr(module, "attention_head_size", 1))
    if head_dim > MAX_HEAD_DIM:
        return Outcome(False, f"head dimension {head_dim}, expected at most {MAX_HEAD_DIM}")
    module.__class__ = replacements[original]
    return Outcome(True, detail)


def swap_back(module: nn.Module, replacements: Mapping[type, type]) -> bool:
    """Undo swap; whether there was something to undo."""
    for original, replacement in replacements.items():
        if type(module) is replacement:
            module.__class__ = original
            return True
    return False


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """A RuntimeWarning the first time that this message is given in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
