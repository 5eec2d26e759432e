"""A package's import name, served by modules of clinattn for a while."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType


class ServedName:
    """Puts modules of clinattn into sys.modules under the name of another package.

    name: of that package. source: the module of clinattn whose `names`, chosen by a function, it
    has. submodules: module of clinattn by dotted name below the package; no others can be imported.
    """

    def __init__(
        self,
        name: str,
        source: str,
        names: Callable[[ModuleType], Iterable[str]],
        submodules: Mapping[str, str],
    ) -> None:
        self.name, self.source = name, source
        self.names, self.submodules = names, submodules
        self.replaced: dict[str, ModuleType] | None = None  # None while not served

    def serve(self, force: bool) -> None:
        """Does nothing where it is served. Raises RuntimeError where the package itself is there.

        force: also then.
        """
        if self.replaced is not None:
            return
        if not force and self._is_present():
            raise RuntimeError(
                f"{self.name}: the package is installed, so nothing was replaced; "
                "install(force=True) puts clinattn in its place"
            )
        source = importlib.import_module(self.source)
        modules = {name: importlib.import_module(x) for name, x in self.submodules.items()}
        self.replaced = self._taken_out()
        package = ModuleType(self.name, f"{self.name}'s interface, served by clinattn.")
        # A package without a folder: submodules are those below, and no others are found.
        package.__spec__ = ModuleSpec(self.name, loader=None, origin=self.source, is_package=True)
        package.__path__ = []
        for name in self.names(source):
            setattr(package, name, getattr(source, name))
        sys.modules[self.name] = package
        for name, module in modules.items():
            sys.modules[f"{self.name}.{name}"] = module
            if "." not in name:
                setattr(package, name, module)

    def give_back(self) -> None:
        """Leaves sys.modules as it was before serve()."""
        if self.replaced is not None:
            self._taken_out()
            sys.modules.update(self.replaced)
            self.replaced = None

    def _is_present(self) -> bool:
        return self.name in sys.modules or importlib.util.find_spec(self.name) is not None

    def _taken_out(self) -> dict[str, ModuleType]:
        """Removes the package's modules from sys.modules, and returns them by name."""
        names = [x for x in sys.modules if x == self.name or x.startswith(f"{self.name}.")]
        return {name: sys.modules.pop(name) for name in names}
