"""A module's class exchanged in place for one with the same parameters and another forward."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn

from clinattn.backends.call import MAX_HEAD_DIM
from clinattn.integrations.outcome import Outcome
from clinattn.operator import split

# Parameters of transformers' forwards under the names that later releases gave them.
RENAMED = {"cache": "past_key_values"}  # 5.24


def subclasses(families: Mapping[tuple[str, str], type], home: str) -> dict[type, type]:
    """Original class -> a subclass of the same name with the forward of its family.

    families: (model of transformers, class in it) -> what the subclass is made with. Those that the
    installed transformers does not have are left out. home: the module that pickle is to look in.
    """
    made = {}
    for (model, name), family in families.items():
        try:
            module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
            original = getattr(module, name)
        except (ImportError, AttributeError):
            continue
        made[original] = type(name, (family, original), {"__module__": home})
    return made


def swap(module: nn.Module, replacements: Mapping[type, Any], detail: str) -> Outcome | None:
    """Give module the class that replaces its own; None where none does.

    replacements: original class -> its subclass. A subclass has the name of the original, which
    device maps and wrapping policies look for, and in forward_parameters all that it knows what to
    do with; a release whose forward has others, or in another order, is refused. A second swap
    changes nothing.
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
    expected = replacements[original].forward_parameters
    found = tuple(inspect.signature(original.forward).parameters)[1:]
    named = [x if x in expected else RENAMED.get(x, x) for x in found]
    known = tuple(x for x in named if x != "cache_position")  # of a decoder, in earlier releases
    if known != tuple(x for x in expected if x in known):
        release = version("transformers")
        return Outcome(False, f"transformers {release} has forward{found}, expected {expected}")
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


def warn_of_attentions(module: nn.Module) -> None:
    """A RuntimeWarning, once a class, that a call gives probabilities, and so is the original's."""
    name = type(module).__name__
    split.refuse(f"attention probabilities of {name}")
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name}: attention probabilities were asked for; such calls run the code of "
            "transformers, in its memory; clinattn.explain(model) and clinattn.attention_summary "
            "say what was attended to in O(N)",
            RuntimeWarning,
            stacklevel=3,
        )
