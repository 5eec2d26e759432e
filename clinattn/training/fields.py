"""Fields of settings: default, help, choices and least value, said once for Python and a shell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Phrases = Mapping[str, str]  # names, each with what it is in a few words
# A function, where a list takes imports
Choices = tuple[str, ...] | Callable[[], tuple[str, ...] | Phrases]


@dataclass(frozen=True)
class Option:
    """Facts on a field besides its type and default.

    names: what NAME may be in a value such as profile:NAME. shown: how a command names the
    default, where that is not the field's. name: the option's name, where it is not the field's.
    """

    help: str
    choices: Choices = ()
    least: int | None = None
    names: Callable[[], Phrases] | None = None
    shown: str | None = None
    name: str | None = None

    def allowed(self) -> tuple[str, ...]:
        """The choices; () where any value may be given."""
        return tuple(self._chosen())

    def phrases(self) -> Phrases:
        """Returns the names for NAME, or the choices, with their phrases; empty without phrases."""
        found = self._chosen() if self.names is None else self.names()
        return found if isinstance(found, Mapping) else {}

    def _chosen(self) -> tuple[str, ...] | Phrases:
        return self.choices() if callable(self.choices) else self.choices


def option(default: Any, help: str, **known: Any) -> Any:
    """A dataclass field that is an option of a command; `known` as in Option."""
    return field(default=default, metadata={"option": Option(help, **known)})


def options(settings: type) -> dict[str, Option]:
    """The options of a dataclass by the name of their fields."""
    found = {f.name: f.metadata.get("option") for f in fields(settings)}
    return {name: known for name, known in found.items() if known is not None}


def check(settings: Any) -> None:
    """Raises ValueError for a value that is no choice, or below the least. None is no value.

    Of a tuple, every item is a choice, and one is needed.
    """
    for name, known in options(type(settings)).items():
        value, allowed = getattr(settings, name), known.allowed()
        if isinstance(value, tuple):
            if allowed and (not value or set(value) - set(allowed)):
                raise ValueError(f"{name}={value}: expected some of {allowed}")
        elif allowed and value is not None and value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {allowed}")
        elif known.least is not None and value is not None and not value >= known.least:
            raise ValueError(f"{name}={value}: expected at least {known.least}")


def check_device(device: str) -> None:
    """Raises ValueError for "cuda" where torch sees no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': expected a CUDA device, and torch sees none")
