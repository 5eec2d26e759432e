"""Encoders of transformers in bf16 whose residual stream is fp32.

A layer of a bf16 model adds to rounded numbers and rounds the sum. Here what a layer or embedding
returns is bf16 as well, and is remembered in fp32: the next layer goes on from that, unless what it
is given is no longer the same tensor with the same numbers, after a hook say.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from clinattn.encoder.linear import is_wrapped, serves_stream
from clinattn.integrations import stand_in
from clinattn.integrations.outcome import Outcome
from clinattn.integrations.stand_in import StandIn
from clinattn.integrations.swap import swap_back
from clinattn.integrations.torch.linear import Linear
from clinattn.integrations.transformers.around_linear import AroundLinear

# By model: layers, which take the hidden states first and return them, alone or first; and
# embeddings, whose numbers come from tables and a norm.
CLASSES = {
    "bert": ("BertLayer", "BertEmbeddings"),
    "bert_generation": ("BertGenerationLayer", "BertGenerationEmbeddings"),
    "big_bird": ("BigBirdLayer", "BigBirdEmbeddings"),
    "camembert": ("CamembertLayer", "CamembertEmbeddings"),
    "data2vec": ("Data2VecTextLayer", "Data2VecTextEmbeddings"),
    "distilbert": ("TransformerBlock", "Embeddings"),
    "electra": ("ElectraLayer", "ElectraEmbeddings"),
    "ernie": ("ErnieLayer", "ErnieEmbeddings"),
    "layoutlm": ("LayoutLMLayer", "LayoutLMEmbeddings"),
    "longformer": ("LongformerLayer", "LongformerEmbeddings"),
    "markuplm": ("MarkupLMLayer", "MarkupLMEmbeddings"),
    "megatron_bert": ("MegatronBertLayer", "MegatronBertEmbeddings"),
    "modernbert": ("ModernBertEncoderLayer", "ModernBertEmbeddings"),
    "mpnet": ("MPNetLayer", "MPNetEmbeddings"),
    "rembert": ("RemBertLayer", "RemBertEmbeddings"),
    "roberta": ("RobertaLayer", "RobertaEmbeddings"),
    "roc_bert": ("RoCBertLayer", "RoCBertEmbeddings"),
    "roformer": ("RoFormerLayer", "RoFormerEmbeddings"),
    "splinter": ("SplinterLayer", "SplinterEmbeddings"),
    "tapas": ("TapasLayer", "TapasEmbeddings"),
    "visual_bert": ("VisualBertLayer", "VisualBertEmbeddings"),
    "xlm_roberta": ("XLMRobertaLayer", "XLMRobertaEmbeddings"),
}
# The norm after the last layer of those with norms before, by the class that holds it
FINAL_NORMS = {"MegatronBertEncoder": "ln", "ModernBertModel": "final_norm"}

# By rounded tensor: the exact one, and the version of the rounded one then, None in inference mode,
# which counts none
_unrounded = WeakTensorKeyDictionary()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype, remembered as it was."""
    y = x.to(dtype)
    _unrounded[y] = x, None if y.is_inference() else y._version
    return y


def unrounded(y: Tensor) -> Tensor | None:
    """Returns what y was rounded from; None where that is not known, or y was written into."""
    x, version = _unrounded.get(y, (None, None))
    if x is None:
        return None
    same = torch.equal(x.to(y.dtype), y) if version is None else y._version == version
    return x if same else None


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that takes fp32 beside weights of bf16, and returns what it was given."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.weight is None:
            return super().forward(input)
        if self.weight.dtype != torch.bfloat16:
            return super().forward(input)
        x = input if input.dtype == torch.float32 else unrounded(input)
        if x is None:
            return super().forward(input)
        weight, bias = (None if a is None else a.float() for a in (self.weight, self.bias))
        y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y if x is input else rounded(y, input.dtype)


class _Stream(StandIn):
    """Base of the stand-ins for layers and embeddings."""


class Layer(_Stream):
    """hidden_states: (B, N, E); the other arguments and the result are those of the layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        dtype = hidden_states.dtype
        if not serves_stream(hidden_states) or not takes_stream(self):  # type: ignore[arg-type]
            return forward(hidden_states, *args, **kwargs)
        x = unrounded(hidden_states)
        result = forward(hidden_states.float() if x is None else x, *args, **kwargs)
        if isinstance(result, tuple):
            return rounded(result[0], dtype), *result[1:]
        return rounded(result, dtype)


class Embeddings(_Stream):
    """The sum of embeddings and its norm in fp32."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = super().forward  # type: ignore[misc]
        weight = next(self.parameters())  # type: ignore[attr-defined]
        if not serves_stream(weight) or not takes_stream(self):  # type: ignore[arg-type]
            return forward(*args, **kwargs)
        with _RowsInFloat():
            result = forward(*args, **kwargs)
        return rounded(result, weight.dtype)


class _RowsInFloat(TorchFunctionMode):
    """Rows of embedding tables are fp32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.float() if func is F.embedding else result


def takes_stream(module: nn.Module) -> bool:
    """Returns whether all in a module that has parameters takes fp32 where its weights are bf16."""
    if type(module) is Linear:
        return not is_wrapped(module)
    if isinstance(module, AroundLinear):
        return all(takes_stream(getattr(module, name)) for name in module.layers)
    if type(module) in (LayerNorm, nn.Embedding):
        return True
    if any(x is not None for x in module._parameters.values()):
        return False
    return all(takes_stream(child) for child in module._modules.values() if child is not None)


@cache
def kinds() -> dict[type, type[_Stream]]:
    """Class of the installed transformers -> what serves it."""
    found: dict[type, type[_Stream]] = {}
    for model, names in CLASSES.items():
        name = "data2vec_text" if model == "data2vec" else model
        try:
            module = importlib.import_module(f"transformers.models.{model}.modeling_{name}")
        except ImportError:
            continue
        for name, kind in zip(names, (Layer, Embeddings), strict=True):
            if hasattr(module, name):
                found[getattr(module, name)] = kind
    return found


@cache
def stand_in_of(cls: type) -> Any:
    """The class that takes the place of a layer's or of embeddings', under its name."""
    return type(cls.__name__, (kinds()[cls], cls), {"replaces": cls, "__module__": __name__})


_Stream.stand_in_of = staticmethod(stand_in_of)


def adapt(module: nn.Module) -> Outcome | None:
    """Gives layers and embeddings of known encoders, and norms in them, what keeps fp32.

    Returns None for others, and for layers some of whose linear layers were not replaced.
    """
    if isinstance(module, (_Stream, LayerNorm)):
        return Outcome(True, "fp32 in an encoder of bf16")
    cls: Any = type(module)
    final = FINAL_NORMS.get(cls.__name__)
    if final is not None and cls.__module__.startswith("transformers.models."):
        _swap_norms(getattr(module, final))
        return None
    if cls not in kinds():
        return None
    if "forward" in vars(module):
        return Outcome(False, "its forward was overridden on the instance")
    swapped = _swap_norms(module)
    if not takes_stream(module):
        for norm in swapped:
            restore(norm)
        return Outcome(False, "not fp32 in bf16: a layer in it was not replaced, or has hooks")
    module.__class__ = stand_in_of(cls)
    return adapt(module)


def _swap_norms(module: nn.Module) -> list[nn.Module]:
    """The norms in a module that it calls itself, given their class here."""
    if type(module) is nn.LayerNorm and not is_wrapped(module):
        module.__class__ = LayerNorm
        return [module]
    if isinstance(module, AroundLinear):
        return []
    return [norm for child in module.children() for norm in _swap_norms(child)]


def restore(module: nn.Module) -> bool:
    """Undoes adapt; returns whether there was something to undo."""
    if swap_back(module, {nn.LayerNorm: LayerNorm}):
        return True
    return isinstance(module, _Stream) and stand_in.restore(module)
