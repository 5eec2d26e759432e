"""Classes made for another class, which take its place in a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn


class StandIn:
    """Base of stand-ins for `replaces`, the class that a pickle names, as it can be imported.

    stand_in_of: function of a module that makes the stand-in of a class, as a static method.
    """

    replaces: type
    stand_in_of: ClassVar[Callable[[type], type]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        how: Any = super().__reduce_ex__(protocol)
        if not is_stand_in(self):  # of a class derived from one, as by parametrize
            return how
        return _empty, (type(self).stand_in_of, self.replaces), *how[2:]


def is_stand_in(module: Any) -> bool:
    """Returns whether the module's own class was made for another."""
    return "replaces" in vars(type(module))


def restore(module: nn.Module) -> bool:
    """Gives a module its class again; returns whether there was something to undo."""
    if not is_stand_in(module):
        return False
    cls: Any = type(module)
    module.__class__ = cls.replaces
    return True


def _empty(stand_in_of: Callable[[type], Any], cls: type) -> Any:
    stand_in = stand_in_of(cls)
    return stand_in.__new__(stand_in)
