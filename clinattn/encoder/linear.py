"""Linear layers with what follows them, compiled for the CPU where that serves, else by torch.

In fp32 each number keeps its 24 bits; under autocast to bf16, or with bf16 weights, products are of
bf16 numbers, and sums, activation, residual and norm are fp32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from clinattn.backends import compiled, cpu
from clinattn.operator.words.features import SEEDS

from .embeddings import BiaslessLayerNorm
from .linear_op import (
    LAYER_NORM,
    RMS_NORM,
    WITHOUT_DROPOUT,
    WITHOUT_NORM,
    Dropped,
    Form,
    Linear,
    Norm,
    NormOf,
    activated,
    pays,
    run,
)

# Instruction sets without linear layers
WITHOUT_LAYERS = (None, "scalar")
# Types that compute as nn.Linear does; integrations add theirs
LAYERS: set[type] = {nn.Linear}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
NORMS = {nn.LayerNorm: LAYER_NORM, BiaslessLayerNorm: LAYER_NORM, nn.RMSNorm: RMS_NORM}


def linear(
    layer: nn.Linear,
    x: Tensor,
    *,
    activation: str | None = None,
    gated: bool = False,
    dropout: nn.Dropout | None = None,
    residual: Tensor | None = None,
    norm: nn.Module | None = None,
) -> Tensor:
    """norm(residual + dropout(act(layer(x)))), in one pass where the compiled layers serve.

    x: (..., in_features); residual: (..., features), fp32 or bf16. activation: None, "gelu",
    "gelu_tanh" or "relu". gated: act of the first half of the layer's features times the second.
    A layer or norm of another type (quantised, LoRA, parametrised) or with hooks, other types of
    numbers, other devices, compilers, traces, modes and torch.func get torch's own calls.
    Returns (..., features): in the residual's dtype, else as the layer does.
    """
    form = None if is_wrapped(layer) else _form(layer, x, residual, activation, gated)
    if form is None:
        return by_torch(
            layer, x, activation=activation, gated=gated,
            dropout=dropout, residual=residual, norm=norm,
        )  # fmt: skip
    return _computed(form, layer, x, dropout, residual, norm)


def forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """The forward of a layer's class, around which hooks run: compiled or nn.Linear's."""
    form = _form(layer, x, None, None, False)
    if form is None:
        return nn.Linear.forward(layer, x)
    return _computed(form, layer, x, None, None, None)


def _computed(
    form: Form,
    layer: nn.Linear,
    x: Tensor,
    dropout: nn.Dropout | None,
    residual: Tensor | None,
    norm: nn.Module | None,
) -> Tensor:
    shape = (*x.shape[:-1], layer.out_features // 2 if form.gated else layer.out_features)
    rows = x.reshape(-1, x.shape[-1])
    dropped = _drawn(dropout)
    at_once = dropped is not None
    added = None if residual is None or not at_once else residual.reshape(-1, shape[-1])
    of_norm = _norm_of(norm) if at_once else None
    weights = () if of_norm is None else (of_norm.gamma, of_norm.beta)
    given = (x, layer.weight, layer.bias, residual, *weights)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in given):
        exact = form if of_norm is None else form._replace(dtype=torch.float32)
        drawn = dropped or WITHOUT_DROPOUT
        y = Linear.run(exact, drawn, rows, layer.weight, layer.bias, added)[0]
        if of_norm:
            y = Norm.run(of_norm.kind, of_norm.eps, form.dtype, y, of_norm.gamma, of_norm.beta)
    else:
        y = run(
            form, rows, layer.weight, layer.bias, added, of_norm or WITHOUT_NORM,
            dropped=dropped or WITHOUT_DROPOUT,
        )[0]  # fmt: skip
    y = y.view(shape)
    if dropout is not None and not at_once:
        y = dropout(y) if residual is None else residual + dropout(y)
    return y if norm is None or of_norm else normalise(norm, y)


def _drawn(dropout: nn.Dropout | None) -> Dropped | None:
    """The dropout for the compiled layers, its seed drawn; None where it is to be called itself."""
    if dropout is None:
        return WITHOUT_DROPOUT
    if type(dropout) is not nn.Dropout or is_wrapped(dropout):
        return None
    if not (dropout.training and dropout.p > 0):
        return WITHOUT_DROPOUT
    return Dropped(dropout.p, int(torch.randint(0, SEEDS, ())))


def serves_stream(x: Tensor) -> bool:
    """Returns whether layers of bf16 weights may take, and add to, fp32 in place of a bf16 x."""
    return x.dtype == torch.bfloat16 and _may_serve(x)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), also for an x of fp32 and a norm of bf16 weights, which torch refuses: in fp32."""
    of_norm = _norm_of(norm)
    if of_norm is None and x.dtype == torch.float32:
        weight = getattr(norm, "weight", None)
        return norm(x.bfloat16() if weight is not None and weight.dtype == torch.bfloat16 else x)
    if of_norm is None or of_norm.gamma is None or x.dtype == of_norm.gamma.dtype:
        return norm(x)
    gamma, beta = (None if a is None else a.to(x.dtype) for a in (of_norm.gamma, of_norm.beta))
    if of_norm.kind == RMS_NORM:
        return nn.functional.rms_norm(x, x.shape[-1:], gamma, of_norm.eps)
    return nn.functional.layer_norm(x, x.shape[-1:], gamma, beta, of_norm.eps)


def by_torch(
    layer: nn.Linear,
    x: Tensor,
    *,
    activation: str | None = None,
    gated: bool = False,
    dropout: nn.Dropout | None = None,
    residual: Tensor | None = None,
    norm: nn.Module | None = None,
) -> Tensor:
    """Returns what `linear` does, by torch's own calls."""
    if x.device.type == "cpu" and type(layer) in LAYERS and not torch.is_autocast_enabled("cpu"):
        x = x.to(layer.weight.dtype)  # of a stream that is kept in fp32
    y = activated(activation, gated, layer(x))
    if dropout is not None:
        y = dropout(y)
    if residual is not None:
        y = residual + y
    return y if norm is None else normalise(norm, y)


def _form(
    layer: nn.Linear, x: Tensor, residual: Tensor | None, activation: str | None, gated: bool
) -> Form | None:
    """Returns the form of the call for the compiled layers; None where torch serves it."""
    if type(layer) not in LAYERS:
        return None
    if not _may_serve(x, layer.weight, layer.bias, residual):
        return None
    if residual is not None and residual.shape[:-1] != x.shape[:-1]:  # one that broadcasts
        return None
    weight = layer.weight
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return None
    in_bfloat16 = autocast or weight.dtype == torch.bfloat16
    if not in_bfloat16:
        if x.dtype != torch.float32 or (residual is not None and residual.dtype != x.dtype):
            return None
        if torch.get_float32_matmul_precision() != "highest":
            return None
        if not pays(in_bfloat16, x.numel() // x.shape[-1], len(weight)):
            return None
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    return Form(activation, gated, in_bfloat16, dtype if residual is None else residual.dtype)


def _may_serve(x: Tensor, *others: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and all(_is_plain(a) for a in (x, *others) if a is not None)
        and x.numel() > 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and serves()
    )


def serves() -> bool:
    """Returns whether this machine has compiled layers."""
    return cpu.instruction_set() not in WITHOUT_LAYERS and compiled_layers()


def _is_plain(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.device.type == "cpu"
    )


def is_wrapped(module: nn.Module) -> bool:
    """Returns whether calling the module does more than its class: hooks, a forward of its own."""
    own = vars(module)
    return "forward" in own or any(map(own.get, HOOKS)) or _has_any_global_hook()


def _norm_of(norm: nn.Module | None) -> NormOf | None:
    """The norm as the compiled layers take it; None where it is to be called."""
    kind = NORMS.get(type(norm))
    if norm is None or kind is None or is_wrapped(norm):
        return None
    given: Any = norm
    gamma, beta, eps = given.weight, getattr(given, "bias", None), given.eps
    if len(given.normalized_shape) != 1:
        return None
    if not all(_is_plain(a) for a in (gamma, beta) if a is not None):
        return None
    return NormOf(kind, gamma, beta, torch.finfo(torch.float32).eps if eps is None else eps)


@functools.cache
def compiled_layers() -> bool:
    """Returns whether the compiled module is there and has the kernel."""
    compiled.compiled_module()
    return torch._C._dispatch_has_kernel_for_dispatch_key("clinattn::cpu_linear", "CPU")
