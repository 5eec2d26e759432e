"""Attention of an existing model, replaced in place."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import NamedTuple

from torch import nn

from clinattn.integrations import unsupported
from clinattn.integrations.outcome import Outcome

# Adapters by the package without which a model has no such module. Each has
# adapt(module) -> Outcome | None and restore(module); the first that answers decides.
ADAPTERS = {
    "torch": ("torch.modules",),
    "transformers": (
        "transformers.models", "transformers.early_transformers", "transformers.longformer",
        "transformers.big_bird", "transformers.bert_shaped", "transformers.xlm", "unsupported",
    ),
}  # fmt: skip


class Replaced(NamedTuple):
    name: str
    type: str
    by: str


class Kept(NamedTuple):
    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Replacement:
    """Result of replace_attention: `replaced` and `kept` modules by name; undo() reverts it all."""

    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives the model its own attention again."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} attention modules replaced, {len(self.kept)} kept"]
        lines += [f"  {count} x {what}" for what, count in _counted(self.replaced).items()]
        lines += [f"  {x.name} ({x.type}) kept: {x.reason}" for x in self.kept]
        return "\n".join(lines)


def _counted(replaced: list[Replaced]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for x in replaced:
        counts[f"{x.type}: {x.by}"] = counts.get(f"{x.type}: {x.by}", 0) + 1
    return counts


def replace_attention(model: nn.Module) -> Replacement:
    """Let the attention modules of a model compute with clinattn, in place.

    model: any torch module: one of transformers, one with torch.nn's attention and transformer
    layers, or one that holds such. Parameters, state dict, hooks and the rest stay as they are. May
    be called again, and on a compiled model.

    Returns a Replacement, which prints what was replaced, and what was not with the reason; its
    undo() takes it back. Warns if nothing was replaced. Raises TypeError unless model is a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)
    result = Replacement()
    adapters = [
        importlib.import_module(f"clinattn.integrations.{name}")
        for package, names in ADAPTERS.items()
        if package in sys.modules  # else the model has nothing of it
        for name in names
    ]
    for adapter in adapters:
        if hasattr(adapter, "switch"):
            result._undo.append(adapter.switch(model))
    result._undo.append(partial(_restore, model, adapters))
    unknown = []
    for name, module in model.named_modules():
        outcomes = (adapter.adapt(module) for adapter in adapters)
        outcome: Outcome | None = next((x for x in outcomes if x is not None), None)
        kind = type(module).__name__
        if outcome is None:
            if unsupported.looks_like_attention(module) or unsupported.calls_sdpa(module):
                unknown.append(Kept(name, kind, unsupported.why_unknown(module)))
        elif outcome.replaced:
            result.replaced.append(Replaced(name, kind, outcome.detail))
        else:
            result.kept.append(Kept(name, kind, outcome.detail))
    answered = [x.name for x in result.replaced] + [x.name for x in result.kept]
    result.kept.extend(x for x in unknown if not _holds_or_is_in(x.name, answered))
    if not result.replaced:
        kind = type(model).__name__
        warnings.warn(f"no attention was replaced in {kind}:\n{result}", stacklevel=2)
    return result


def _restore(model: nn.Module, adapters: list[ModuleType]) -> None:
    for module in model.modules():
        for adapter in adapters:
            adapter.restore(module)


def _holds_or_is_in(name: str, others: list[str]) -> bool:
    """Returns whether a module holds one of the others or lies in one."""
    return any(x.startswith(f"{name}.") or name.startswith(f"{x}.") for x in others)
