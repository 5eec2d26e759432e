"""Attention of an existing model, and its linear layers on request, replaced in place."""

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
# Adapters of linear=True, in their order: linear layers, then modules that hold replaced ones.
LINEAR_ADAPTERS = {
    "torch": ("torch.linear",),
    "transformers": ("transformers.around_linear", "transformers.stream"),
}


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
    """Result of replace_attention: `replaced` and `kept` modules by name; undo() reverts it all.

    Those are of attention. linear, linear_kept: the linear layers, with linear=True; around: what
    computes around them in their pass; around_kept: what might have, but for the reason.
    """

    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    linear: list[Replaced] | None = None
    linear_kept: list[Kept] = field(default_factory=list)
    around: list[Replaced] = field(default_factory=list)
    around_kept: list[Kept] = field(default_factory=list)

    def undo(self) -> None:
        """Gives the model its own attention and linear layers again."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        replaced, kept = several(len(self.replaced), "attention module"), len(self.kept)
        if self.linear is not None:
            replaced += f" and {several(len(self.linear), 'linear layer')}"
            kept += len(self.linear_kept)
        lines = [f"{replaced} replaced, {kept} kept"]
        every = [*self.replaced, *(self.linear or ()), *self.around]
        lines += [f"  {count} x {what}" for what, count in _counted(every).items()]
        every_kept = [*self.kept, *self.linear_kept, *self.around_kept]
        lines += [f"  {x.name} ({x.type}) kept: {x.reason}" for x in every_kept]
        return "\n".join(lines)


def several(count: int, what: str) -> str:
    """A number with its noun: 1 attention module, 2 attention modules."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _counted(replaced: list[Replaced]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for x in replaced:
        counts[f"{x.type}: {x.by}"] = counts.get(f"{x.type}: {x.by}", 0) + 1
    return counts


def replace_attention(model: nn.Module, linear: bool = False) -> Replacement:
    """Let the attention modules of a model compute with clinattn, in place.

    model: any torch module: one of transformers, one with torch.nn's attention and transformer
    layers, or one that holds such. Parameters, state dict, hooks and the rest stay as they are. May
    be called again, and on a compiled model.
    linear: replaces every nn.Linear of fp32 or bf16 weights on the CPU too, and computes the
    activation, residual and norm after it in the same pass in models whose code is known. Sums are
    fp32, and so is the residual stream in known encoders of bf16. A row's bits do not depend on the
    other rows, the batch or the number of threads. From torch's own layers the results differ by
    rounding; where the compiled layers do not serve a call, torch's own do. Default False.

    Returns a Replacement, which prints what was replaced, and what was not with the reason; its
    undo() takes it back. Warns if nothing was replaced. Raises TypeError unless model is a module
    and linear a bool.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(linear, bool):
        raise TypeError(f"linear: got {type(linear).__name__}, expected a bool")
    model = getattr(model, "_orig_mod", model)
    result = Replacement(linear=[] if linear else None)
    adapters = _load(ADAPTERS)
    for adapter in adapters:
        if hasattr(adapter, "switch"):
            result._undo.append(adapter.switch(model))
    result._undo.append(partial(_restore, model, adapters))
    unknown, callers = [], set()
    for name, module in model.named_modules():
        outcome = _first(adapters, module)
        kind = type(module).__name__
        if outcome is None:
            if unsupported.calls_sdpa(module):
                callers.add(name)
            elif not unsupported.looks_like_attention(module):
                continue
            unknown.append(Kept(name, kind, unsupported.why_unknown(module)))
        elif outcome.container:
            continue
        elif outcome.replaced:
            result.replaced.append(Replaced(name, kind, outcome.detail))
        else:
            result.kept.append(Kept(name, kind, outcome.detail))
    answered = [x.name for x in result.replaced] + [x.name for x in result.kept]
    seeming = answered + [x.name for x in unknown]
    result.kept.extend(
        x
        for x in unknown
        if not any(_is_in(x.name, other) for other in answered)
        and (x.name in callers or not any(_is_in(other, x.name) for other in seeming))
    )
    if linear:
        _replace_linear(model, result)
    if not result.replaced and not result.linear:
        kind = type(model).__name__
        what = "attention and no linear layer" if linear else "attention"
        warnings.warn(f"no {what} was replaced in {kind}:\n{result}", stacklevel=2)
    return result


def _replace_linear(model: nn.Module, result: Replacement) -> None:
    assert result.linear is not None
    of_layers, *of_the_rest = _load(LINEAR_ADAPTERS)
    result._undo.append(partial(_restore, model, [of_layers, *of_the_rest]))
    pairs = [
        ([of_layers], result.linear, result.linear_kept),
        *(([adapter], result.around, result.around_kept) for adapter in of_the_rest),
    ]
    for adapters, replaced, kept in pairs:  # each after all of the one before
        for name, module in model.named_modules():
            outcome = _first(adapters, module)
            if outcome is None:
                continue
            kind = type(module).__name__
            if outcome.replaced:
                replaced.append(Replaced(name, kind, outcome.detail))
            else:
                kept.append(Kept(name, kind, outcome.detail))


def _load(adapters: dict[str, tuple[str, ...]]) -> list[ModuleType]:
    """The adapters whose package is imported: else the model has nothing of it."""
    return [
        importlib.import_module(f"clinattn.integrations.{name}")
        for package, names in adapters.items()
        if package in sys.modules
        for name in names
    ]


def _first(adapters: list[ModuleType], module: nn.Module) -> Outcome | None:
    """Returns the outcome of the first adapter that answers for a module."""
    outcomes = (adapter.adapt(module) for adapter in adapters)
    return next((x for x in outcomes if x is not None), None)


def _restore(model: nn.Module, adapters: list[ModuleType]) -> None:
    for module in model.modules():
        for adapter in adapters:
            adapter.restore(module)


def _is_in(name: str, other: str) -> bool:
    """Returns whether a module lies in another one, by their names; the model's own is empty."""
    return name != other and (not other or name.startswith(f"{other}."))
