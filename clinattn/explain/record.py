"""Attention calls of a model's forward pass, kept by layer."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clinattn.backends.call import Arguments
from clinattn.explain.tokens import Layout
from clinattn.operator import listeners

# Arguments by which modules of transformers are given another sequence for their keys
OF_OTHERS = ("encoder_hidden_states", "key_value_states", "kv")


@dataclass
class Layer:
    """A call of attention: index among those of the model, and the module that made it.

    call: without gradients; v has one column where nothing needs it. o: with its history, None
    where it has none. other: why this is not plain self-attention, else None.
    """

    index: int
    name: str
    call: Arguments
    lse: Tensor
    o: Tensor | None
    other: str | None = None


@dataclass
class _Running:
    """A module whose forward runs, and the calls that it has made itself."""

    module: nn.Module
    other: str | None
    made: list[Layer]


class Recorder:
    """Records calls of attention while the model runs, of its last forward pass.

    chosen: indices of the layers that are kept, None for all.
    """

    def __init__(self, model: nn.Module, chosen: frozenset[int] | None):
        self.model = getattr(model, "_orig_mod", model)
        self.chosen = chosen
        self.layers: list[Layer] = []
        self.calls = 0
        self.layout: Layout | None = None
        self.attention_mask: Tensor | None = None
        self.given: tuple[int, ...] | None = None
        self._names = {module: name for name, module in self.model.named_modules()}
        self._running: list[_Running] = []
        self._thread = 0
        self._open = ExitStack()

    def __enter__(self) -> None:
        if self._thread:
            raise RuntimeError("explain: entered twice, expected a `with` for each explain(model)")
        self._thread = threading.get_ident()
        for module in self._names:
            if module is self.model or _may_attend(module):
                before = module.register_forward_pre_hook(self._enters, with_kwargs=True)
                after = module.register_forward_hook(self._leaves, always_call=True)
                self._open.callback(before.remove)
                self._open.callback(after.remove)
        self._open.enter_context(listeners.listening(self._hear))

    def __exit__(self, *error: Any) -> None:
        self._open.close()
        self._running.clear()
        self._thread = 0

    def _enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._thread != threading.get_ident():
            return
        if module is self.model and not self._running:
            self.layers, self.calls, self.layout = [], 0, None
            self._note_inputs(args, kwargs)
        if self._running or module is self.model:
            self._running.append(_Running(module, _attends_to_others(module, args, kwargs), []))
        if self.layout is None:
            self.layout = next((x for x in args if isinstance(x, Layout)), None)

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._thread == threading.get_ident() and self._running:
            while self._running.pop().module is not module:
                pass  # a forward that was left by an exception

    def _note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.attention_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        tensors = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
        first = next((x for x in tensors if isinstance(x, Tensor)), None)
        self.given = None if first is None else tuple(first.shape[:2])

    def _hear(self, call: Arguments, o: Tensor, lse: Tensor) -> None:
        if not self._running:
            return
        index, self.calls = self.calls, self.calls + 1
        running = self._running[-1]
        name = self._names[running.module] or type(running.module).__name__
        if call.dropout_p:
            raise ValueError(
                f"{name}: attention drops pairs (dropout_p={call.dropout_p}), expected a model in "
                "evaluation mode: model.eval()"
            )
        kept = self.chosen is None or index in self.chosen
        differentiable = o.requires_grad
        tensors = [x if x is None else x.detach() for x in call.tensors()]
        call = Arguments._make([*tensors, *call.scalars()])
        if kept and not differentiable:  # nothing else keeps them
            k = _of_its_own(call.k)
            call = call._replace(q=_of_its_own(call.q), k=k, v=k[..., :1])
        made = Layer(index, name, call, lse.detach(), o if differentiable else None)
        made.other = running.other or _is_of_others(call)
        for x in self._running:
            for earlier in x.made:
                made.other = earlier.other = "is made of several calls"
        running.made.append(made)
        if kept:
            self.layers.append(made)


def _of_its_own(x: Tensor) -> Tensor:
    """Returns x, or a copy of a view of more, such as of queries, keys and values in one tensor."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def _may_attend(module: nn.Module) -> bool:
    """Returns whether attention may be called in a module's own forward.

    Not in the smallest layers: hooks of their own would keep compiled linear layers from serving.
    """
    home = type(module).__module__
    small = home.startswith(("torch.nn.", "clinattn.")) or home == "transformers.activations"
    return any(True for _ in module.children()) or not small


def _attends_to_others(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Returns why attention of this module is not self-attention, where its arguments say so."""
    if isinstance(module, nn.MultiheadAttention):
        query = kwargs.get("query", args[0] if args else None)
        key = kwargs.get("key", args[1] if len(args) > 1 else None)
        others = query is not key
    else:
        others = "CrossAttention" in type(module).__name__ or any(
            isinstance(kwargs.get(name), Tensor) for name in OF_OTHERS
        )
    return "is cross-attention" if others else None


def _is_of_others(call: Arguments) -> str | None:
    if call.is_packed():
        ends, others = call.cu_seqlens_q, call.cu_seqlens_k
        assert ends is not None and others is not None
        same = ends is others or torch.equal(ends, others)
    else:
        same = call.q.shape[2] == call.k.shape[2]
    return None if same else "has other keys than queries"
