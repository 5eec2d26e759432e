"""Linear layers in fp32 on AMX tiles, at 24 bits: each number is the sum of three bf16 parts.

On AMX these layers are faster than torch's, which run on AVX-512 (bench/NOTES.md). From ROWS on,
tiles give a row the same bits whatever the rows beside it and the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from clinattn.backends import compiled, cpu
from clinattn.operator.autograd import Function
from clinattn.operator.ops import LIB

LIB.define(
    "cpu_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)

# With fewer rows or columns, taking numbers apart costs more than the products save.
ROWS, COLUMNS = 256, 128
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x): on AMX where that is faster and nothing but the result is asked for.

    A layer of another type (quantised, LoRA, parametrised) or with hooks, autocast, compilers,
    traces, modes and torch.func get the call itself.
    """
    if not _served(layer, x):
        return layer(x)
    rows = x.reshape(-1, x.shape[-1])
    bias = layer.bias
    if torch.is_grad_enabled():
        y = Linear.run(rows, layer.weight, bias)
    else:
        y = _product(rows, layer.weight, bias)
    return y.view(*x.shape[:-1], -1)


def _served(layer: nn.Linear, x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(layer) is nn.Linear
        and _is_plain(x)
        and _is_plain(layer.weight)
        and (layer.bias is None or _is_plain(layer.bias))
        and x.numel() >= ROWS * x.shape[-1] > 0
        and not any(getattr(layer, hooks) for hooks in HOOKS)
        and not _has_any_global_hook()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and torch.get_float32_matmul_precision() == "highest"
        and _built()
        and cpu.instruction_set() == "amx"
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"


@functools.cache
def _built() -> bool:
    """Returns whether the compiled module is there and has the kernel."""
    compiled.compiled_module()
    return torch._C._dispatch_has_kernel_for_dispatch_key("clinattn::cpu_linear", "CPU")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) weight (N, K)^T + bias (N,); a transposed x is more work."""
    if len(x) < ROWS or len(weight) < (COLUMNS if x.stride(-1) == 1 else ROWS):
        return nn.functional.linear(x, weight, bias)
    x, weight = (a if 1 in a.stride() else a.contiguous() for a in (x, weight))
    return torch.ops.clinattn.cpu_linear(x, weight, bias)


class Linear(Function):
    """_product with its gradients, which are products, too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            Linear.run(dy, weight.t(), None) if wants_x else None,
            Linear.run(dy.t(), x.t(), None) if wants_weight else None,
            dy.sum(0) if wants_bias else None,
        )
