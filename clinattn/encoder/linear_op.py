"""The compiled linear layer on CPU: norm(residual + dropout(act(x weight^T + bias))) in one pass.

y is written once: what follows the product is computed while its sums are in cache (csrc/linear.h
has the formula). Sums are fp32, of products of fp32 or of bf16 numbers. The bits of a row do not
depend on the rows beside it or on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clinattn.backends import cpu
from clinattn.operator.autograd import Function
from clinattn.operator.ops import LIB

LIB.define(
    "cpu_linear(Tensor x, Tensor weight, Tensor? bias, int activation, bool gated, "
    "float dropout_p, int seed, Tensor? residual, int norm, Tensor? gamma, Tensor? beta, "
    "float eps, bool in_bfloat16, ScalarType dtype, ScalarType? before) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIB.define(
    "cpu_linear_activation_backward(Tensor dy, Tensor? u, int activation, bool gated, "
    "float dropout_p, int seed, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIB.define(
    "cpu_norm(Tensor x, int norm, Tensor? gamma, Tensor? beta, float eps, ScalarType dtype) -> "
    "Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)

# On AMX fp32 numbers are taken apart, which costs more than the products save with fewer rows or
# columns. Other instruction sets serve any size.
AMX_ROWS, AMX_COLUMNS = 256, 128
# Activations and norms by their numbers in csrc/linear.h
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
NO_NORM, LAYER_NORM, RMS_NORM = 0, 1, 2


class Form(NamedTuple):
    """Formula and types of numbers of a layer.

    gated: the first half of u is activated and multiplied with the second. in_bfloat16: products
    are of bf16 numbers. dtype: of y.
    """

    activation: str | None
    gated: bool
    in_bfloat16: bool
    dtype: torch.dtype


class Dropped(NamedTuple):
    """Dropout of act(u): numbers by Philox4x32-7 of (seed, row, column), as in attention."""

    p: float = 0.0
    seed: int = 0


class NormOf(NamedTuple):
    """Norm of the rows of y, with its weights."""

    kind: int = NO_NORM
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 0.0


WITHOUT_DROPOUT, WITHOUT_NORM = Dropped(), NormOf()


def pays(in_bfloat16: bool, rows: int, columns: int, transposed: bool = False) -> bool:
    """Returns whether a compiled product is faster than torch's.

    transposed: the first operand lies in memory column by column.
    """
    if in_bfloat16 or cpu.instruction_set() != "amx":
        return True
    return rows >= AMX_ROWS and columns >= (AMX_ROWS if transposed else AMX_COLUMNS)


def run(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    norm: NormOf = WITHOUT_NORM,
    before: torch.dtype | None = None,
    dropped: Dropped = WITHOUT_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """y (M, N), and u = x weight^T + bias in the dtype `before`, or an empty tensor.

    x: (M, K); weight: (N, K), or (2 N, K) where gated; bias like its rows; residual: (M, N). All
    fp32 or bf16, with any strides. Raises RuntimeError for other shapes and types.
    """
    vectors = [None if a is None else a.float().contiguous() for a in (bias, norm.gamma, norm.beta)]
    bias, gamma, beta = vectors
    x, weight = (a if 1 in a.stride() else a.contiguous() for a in (x, weight))
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    return torch.ops.clinattn.cpu_linear(
        x, weight, bias, ACTIVATIONS[form.activation], form.gated, *dropped, residual,
        norm.kind, gamma, beta, norm.eps, form.in_bfloat16, form.dtype, before,
    )  # fmt: skip


class Norm(Function):
    """The norm that ends `run`, of rows x (M, N) in fp32, to the bit, with gradients."""

    @staticmethod
    def forward(
        kind: int,
        eps: float,
        dtype: torch.dtype,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> Tensor:
        vectors = [None if a is None else a.float().contiguous() for a in (gamma, beta)]
        return torch.ops.clinattn.cpu_norm(x, kind, *vectors, eps, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind, ctx.eps, _, x, gamma, beta = inputs
        ctx.save_for_backward(x, gamma, beta)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        saved: list[Any] = list(ctx.saved_tensors)
        if not again:
            saved = [None if a is None else a.detach().requires_grad_() for a in saved]
        x, gamma, beta = saved
        wanted = ctx.needs_input_grad[3:]
        inputs = [a for a, wants in zip(saved, wanted, strict=True) if wants]
        with torch.enable_grad():
            weight, bias = (None if a is None else a.float() for a in (gamma, beta))
            size = x.shape[1:]
            if ctx.kind == LAYER_NORM:
                y = F.layer_norm(x, size, weight, bias, ctx.eps)
            else:
                y = F.rms_norm(x, size, weight, ctx.eps)
        grads = iter(torch.autograd.grad(y, inputs, dy.float(), create_graph=again))
        return None, None, None, *(next(grads) if wants else None for wants in wanted)


class Linear(Function):
    """residual + dropout(act(x weight^T + bias)), with gradients by products of the same kind."""

    @staticmethod
    def forward(
        form: Form,
        dropped: Dropped,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        before = None
        if form.activation is not None or form.gated:
            before = torch.bfloat16 if form.in_bfloat16 else torch.float32
        return run(form, x, weight, bias, residual, before=before, dropped=dropped)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.form, ctx.dropped, x, weight, bias, residual = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # a gradient of u would be zeros
        ctx.save_for_backward(x, weight, bias, output[1])
        ctx.residual_dtype = None if residual is None else residual.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        form, (x, weight, bias, u) = ctx.form, ctx.saved_tensors
        _, _, wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad
        du = _gradient_of_u(form, ctx.dropped, dy, x, weight, bias, u)

        def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
            if not pays(form.in_bfloat16, len(a), len(b), transposed=a.stride(-1) != 1):
                return F.linear(a, b)
            plain = Form(None, False, form.in_bfloat16, dtype)
            return Linear.run(plain, WITHOUT_DROPOUT, a, b, None, None)[0]

        def sum_of_rows(dtype: torch.dtype) -> Tensor:
            if du.dtype == dtype == torch.float32:
                return du.sum(0)
            return product(du.new_ones(1, len(du)), du.t(), dtype)[0]  # torch would copy du as fp32

        return (
            None,
            None,
            product(du, weight.t(), x.dtype) if wants_x else None,
            product(du.t(), x.t(), weight.dtype) if wants_weight else None,
            sum_of_rows(bias.dtype) if wants_bias else None,
            dy.to(ctx.residual_dtype) if wants_residual else None,
        )


def _gradient_of_u(
    form: Form,
    dropped: Dropped,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
) -> Tensor:
    """The gradient of u from that of dropout(act(u)); differentiable itself in grad mode."""
    is_linear = form.activation is None and not form.gated
    if is_linear and not dropped.p:
        return dy
    if not torch.is_grad_enabled():
        return _backward(form, dropped, dy, None if is_linear else u)
    if dropped.p:
        dy = dy * _backward(Form(None, False, False, dy.dtype), dropped, torch.ones_like(dy), None)
    if is_linear:
        return dy
    plain = Form(None, False, form.in_bfloat16, torch.float32)
    u = Linear.run(plain, WITHOUT_DROPOUT, x, weight, bias, None)[0]
    with torch.enable_grad():
        y = activated(form.activation, form.gated, u)
        return torch.autograd.grad(y, u, dy.to(y.dtype), create_graph=True)[0]


def _backward(form: Form, dropped: Dropped, dy: Tensor, u: Tensor | None) -> Tensor:
    dtype = torch.bfloat16 if form.in_bfloat16 else torch.float32
    return torch.ops.clinattn.cpu_linear_activation_backward(
        dy.contiguous(), u, ACTIVATIONS[form.activation], form.gated, *dropped, dtype
    )


def activated(activation: str | None, gated: bool, u: Tensor) -> Tensor:
    """act(u), or act(the first half of u's features) times the second, by torch."""
    if gated:
        u, gate = u.chunk(2, dim=-1)
        return activated(activation, False, u) * gate
    if activation is None:
        return u
    if activation == "relu":
        return F.relu(u)
    return F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")
