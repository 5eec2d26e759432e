"""Imports a module right after another one, whenever the program imports that other one."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(first: str, then: str) -> None:
    """Imports the module `then`: now if `first` is imported already, else right after it."""
    if first in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Waiting(first, then))


class _Waiting(MetaPathFinder):
    def __init__(self, first: str, then: str):
        self.first, self.then = first, then

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self.first:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self.then)
        return spec


class _Followed(Loader):
    def __init__(self, loader: Loader, then: str):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # as without this hook
        self.loader.exec_module(module)
        importlib.import_module(self.then)
