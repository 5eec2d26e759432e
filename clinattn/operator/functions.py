"""FusedAttention, and the Functions of its derivatives."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from clinattn.backends.call import FEATURE_SCALARS, NEEDS, Arguments, Gradients, Incoming
from clinattn.operator import listeners, ops, split  # ops registers torch.ops.clinattn
from clinattn.operator.autograd import Function, op_is_watched
from clinattn.operator.visibility import unexpanded
from clinattn.operator.words import checks, feature_checks, forms
from clinattn.operator.words.scalars import as_flag, as_float, as_int, as_size, at_most_far

FORWARD = torch.ops.clinattn.attention_forward.default
BACKWARD = torch.ops.clinattn.attention_backward.default
DOUBLE_BACKWARD = torch.ops.clinattn.attention_double_backward.default

FROM_SHAPES = ("scale", "max_seqlen_q", "max_seqlen_k")  # where they are None
NAMES = (*Arguments._fields, "backend", "return_lse")
DEFAULTS = Arguments._field_defaults | dict.fromkeys(FROM_SHAPES)
# The arguments of FusedAttention: the fields of a call, the backend, and whether to return lse.
_of_names: Any = namedtuple  # mypy knows only those with a literal list of names
Given = _of_names("Given", NAMES, defaults=[*DEFAULTS.values(), "", False])
OF_GRAD = (*Incoming._fields, *Arguments._fields, "needs", "backend")


def _places(names: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the places of the inputs of Gradients among the arguments with these names."""
    return tuple(names.index(name) for name in Gradients._fields)


# Constants, as torch.compile warns of a cached function.
PLACES, PLACES_OF_GRAD = map(_places, (NAMES, OF_GRAD))


def _forward(call: Arguments, backend: str) -> tuple[Any, ...]:
    """Runs the forward op. Unwatched, it takes 10 us less, and None stands for zeros in lse_low."""
    if op_is_watched(call.q, call.k, call.v):
        return FORWARD(*call, backend)
    return ops.forward(call, backend)


def _backward(call: Arguments, incoming: Incoming, needs: int, backend: str) -> tuple[Tensor, ...]:
    """Runs the backward op, without its 15 us of dispatch where nothing watches the op."""
    if op_is_watched(call.q, call.k, call.v):
        return BACKWARD(*incoming, *call, needs, backend)
    return ops.backward(call, incoming, needs, backend)


class FusedAttention(Function):
    """Attention with its gradients; `apply(q, k, v)` is the plain call and returns o.

    Further arguments are those of the op clinattn::attention_forward, in the same order, with
    defaults. return_lse=True returns (o, lse, lse_low), where lse_low is the part of lse that
    rounding took away, and has no gradient. q, k and v may have the forms that fused_attention
    takes, which is the function for users, except under torch.compile: four dimensions there.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        # torch.compile does not come through here: it traces forward and backward themselves.
        split.refuse("FusedAttention.apply")
        given: Any = Given(*args, **kwargs)
        q, k, v = given[:3]
        checks.check_tensors(q, k, v)
        form = None
        if given.cu_seqlens_q is None and not forms.is_dense(q.shape, k.shape, v.shape, False):
            fewer_heads = q.dim() > 2 < k.dim() and 1 != k.shape[-3] < q.shape[-3]
            form = forms.dense_form(q, k, v, given.mask, fewer_heads)
            q, k, v, mask, _ = form
            given = given._replace(q=q, k=k, v=v, mask=mask)
        call, backend, return_lse = _complete(*given)
        return_lse = as_flag("return_lse", return_lse)
        check = checks.check_packed if call.is_packed() else checks.check_dense
        check(q, k, v, True)
        if call.mask is not None:
            checks.check_mask(call.mask, (*q.shape[:3], k.shape[2]), q.device)
            call = call._replace(mask=unexpanded(call.mask))
        if not torch.compiler.is_compiling():  # torch.export does, with what attend was given
            call, backend = _checked(call, backend)
        o, lse, lse_low = cls.run(*call, backend, True)
        if lse_low is None:
            lse_low = torch.zeros_like(lse)
        if form is not None:
            o, lse, lse_low = (form.as_given(x, 2) for x in (o, lse, lse_low))
        return (o, lse, lse_low) if return_lse else o

    @staticmethod
    def forward(*given: Any) -> Any:
        call, backend, return_lse = _complete(*_without_context(*given))
        outputs = _forward(call, backend)
        return outputs if return_lse else outputs[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call, backend, return_lse = _complete(*inputs)
        o, lse, lse_low = output if return_lse else (output, None, None)
        ctx.set_materialize_grads(False)
        if lse_low is not None:
            ctx.mark_non_differentiable(lse_low)
        ctx.save_for_backward(*call.tensors(), o, lse, lse_low)
        ctx.scalars, ctx.backend = call.scalars(), backend

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None = None, _: Any = None) -> Any:
        if do is None and dlse is None:
            return (None,) * len(NAMES)
        needs = _needs(PLACES, ctx.needs_input_grad)
        *tensors, o, lse, lse_low = ctx.saved_tensors
        call = Arguments(*tensors, *ctx.scalars)
        grads = gradients(call, do, dlse, (o, lse, lse_low), needs, ctx.backend)
        return tuple(_placed(len(NAMES), PLACES, grads, needs))


def _without_context(first: Any, *others: Any) -> tuple[Any, ...]:
    """Drops the context that torch.compile puts first where there are no gradients."""
    return (first, *others) if isinstance(first, Tensor) else others


def _complete(*args: Any, **kwargs: Any) -> tuple[Arguments, str, bool]:
    """Returns (call, backend, return_lse), with defaults for what is left out or None."""
    *row, backend, return_lse = Given(*args, **kwargs)
    call = Arguments(*row)
    tokens = 0 if call.is_packed() else 2
    if call.scale is None:
        call = call._replace(scale=call.q.shape[-1] ** -0.5)
    if call.max_seqlen_q is None:
        call = call._replace(max_seqlen_q=call.q.shape[tokens])
    if call.max_seqlen_k is None:
        call = call._replace(max_seqlen_k=call.k.shape[tokens])
    return call, backend, return_lse


def _checked(call: Arguments, backend: Any) -> tuple[Arguments, str]:
    """Checks all arguments but q, k, v and the mask; returns them as the op takes them."""
    dtype = call.q.dtype
    sides: dict[str, Any] = {}
    for name, given in (("window_left", call.window_left), ("window_right", call.window_right)):
        side = as_int(name, given)
        if side < -1:
            raise ValueError(f"{name}: got {side}, expected >= 0, or -1 for no bound")
        sides[name] = at_most_far(side)
    scalars = {name: getattr(call, name) for name in FEATURE_SCALARS}
    scalars["softcap"] = as_float("softcap", call.softcap) or None
    call = call._replace(
        scale=checks.check_scale(call.scale, call.q.shape[-1], dtype),
        **sides,
        bottom_right=as_flag("bottom_right", call.bottom_right),
        **feature_checks.check_scalars(scalars, dtype, None),
    )
    call = _with_checked_parts(call)
    unnamed = isinstance(backend, str) and not backend
    return call, checks.check_backend(None if unnamed else backend)


def _with_checked_parts(call: Arguments) -> Arguments:
    """Checks lengths, intervals and terms; returns the call as Arguments describes it."""
    q, k, packed = call.q, call.k, call.is_packed()
    heads, device = q.shape[1], q.device
    checked: dict[str, Any] = {}
    for side, x, cu_seqlens, longest in (
        ("q", q, call.cu_seqlens_q, call.max_seqlen_q),
        ("k", k, call.cu_seqlens_k, call.max_seqlen_k),
    ):
        name = f"max_seqlen_{side}"
        if packed:
            checked[name] = checks.check_cu_seqlens(side, cu_seqlens, longest, x.shape[0], device)
        elif cu_seqlens is not None:
            raise ValueError(f"cu_seqlens_{side}: got one for q (B, H, N, D), expected None")
        else:
            checked[name] = as_size(name, longest)
    batch = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    if call.cu_seqlens_k is not None and call.cu_seqlens_k.shape[0] - 1 != batch:
        raise ValueError(f"cu_seqlens_k: expected the {batch} sequences of cu_seqlens_q")
    for name, given, most in (
        ("q_lengths", call.q_lengths, q.shape[-2]),
        ("kv_start", call.kv_start, k.shape[-2]),
        ("kv_end", call.kv_end, k.shape[-2]),
    ):
        if given is None:
            continue
        if packed:
            raise ValueError(f"{name}: got one with cu_seqlens, expected None")
        checked[name] = checks.check_lengths(name, given, batch, most, device)
    rows: tuple[int, ...] = (q.shape[0],) if packed else (batch, q.shape[2])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shapes: dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]] = {
        "lo": (torch.int32, (rows,)),
        "hi": (torch.int32, (rows,)),
        "times": (dtype, (rows,)),
        "decay": (dtype, ((heads,),)),
        "slopes": (dtype, ((1, heads), (batch, heads))),
        "relative": (dtype, ()),
        "seed": (torch.int64, ((1,),)),
    }
    for name, (expected, fits) in shapes.items():
        x = getattr(call, name)
        if x is None:
            continue
        checks.check_on(name, x, device)
        shape = tuple(x.shape)
        if name == "relative":
            fits = ((heads, 2 * (shape[-1] // 2) + 1 if shape else 1),)
        if x.dtype != expected or shape not in fits:
            raise ValueError(
                f"{name}: got {x.dtype} {shape}, expected {expected} {' or '.join(map(str, fits))}"
            )
    for one, other in (("lo", "hi"), ("times", "decay")):
        if (getattr(call, one) is None) != (getattr(call, other) is None):
            raise ValueError(f"{one} and {other}: got one of them, expected both or neither")
    if call.seed is None and call.dropout_p != 0:
        raise ValueError(f"seed: got None with dropout_p={call.dropout_p}, expected one")
    return call._replace(**checked)


class DirectAttention(torch.autograd.Function):
    """FusedAttention for calls that nothing watches: fewer inputs take less of the host's time.

    The inputs are those that can have a gradient, in the order of Gradients, then the request: the
    call and the backend. Returns (o, lse).
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call, backend = args[-1]
        o, lse, lse_low = ops.forward(call, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.tensors(), o, lse, lse_low)
        ctx.scalars, ctx.backend = call.scalars(), backend
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        if do is None and dlse is None:
            return (None,) * (len(Gradients._fields) + 1)
        *tensors, o, lse, lse_low = ctx.saved_tensors
        call = Arguments._make((*tensors, *ctx.scalars))
        wanted = ctx.needs_input_grad[:-1]
        needs = sum(itertools.compress(NEEDS.values(), wanted[3:]))
        grads = gradients(call, do, dlse, (o, lse, lse_low), needs, ctx.backend)
        return *[x if wants else None for x, wants in zip(grads, wanted, strict=True)], None


# Function.apply without its part for functorch transforms
DIRECT = super(torch.autograd.Function, DirectAttention).apply


def gradients(
    call: Arguments,
    do: Tensor | None,
    dlse: Tensor | None,
    results: tuple[Any, ...],
    needs: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """Runs the backward op, differentiable once more where a caller may ask for that."""
    o, lse, lse_low = results
    if lse is None:  # a compiled apply(q, k, v), whose forward has no second output
        o, lse, lse_low = _forward(call, backend)
    incoming = Incoming(torch.zeros_like(o) if do is None else do, dlse, o, lse, lse_low)
    # A result that is not differentiated again, as in a compiled graph, needs no Function.
    again = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    if not again or torch.compiler.is_compiling():
        return _backward(call, incoming, needs, backend)
    return FusedAttentionGrad.run(*incoming, *call, needs, backend)


def _needs(places: tuple[int, ...], wanted: Sequence[bool]) -> int:
    """Returns the bits of NEEDS. wanted: whether the argument at each place needs a gradient."""
    needs = 0
    for at, bit in zip(places[3:], NEEDS.values(), strict=True):
        if at < len(wanted) and wanted[at]:  # those left out have no gradient
            needs |= bit
    return needs


def _placed(
    count: int, places: tuple[int, ...], grads: Sequence[Any], needs: int
) -> list[Tensor | None]:
    """Returns `count` values: each of the Gradients at its place, None elsewhere."""
    placed: list[Tensor | None] = [None] * count
    for at, grad, bit in zip(places, grads, (-1, -1, -1, *NEEDS.values()), strict=True):
        if bit < 0 or needs & bit:
            placed[at] = grad
    return placed


class FusedAttentionGrad(Function):
    """The backward op, which can be differentiated once more."""

    @staticmethod
    def forward(do: Any, dlse: Any, o: Any, lse: Any, lse_low: Any, *args: Any) -> Any:
        *row, needs, backend = args
        return _backward(Arguments(*row), Incoming(do, dlse, o, lse, lse_low), needs, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        do, dlse, _, lse, lse_low, *row, needs, _ = inputs
        call = Arguments(*row)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(do, dlse, lse, lse_low, *call.tensors())
        ctx.scalars, ctx.first_needs = call.scalars(), needs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(x is None for x in cotangents):
            return (None,) * len(OF_GRAD)
        do, dlse, lse, lse_low, *tensors = ctx.saved_tensors
        call = Arguments(*tensors, *ctx.scalars)
        needs = _needs(PLACES_OF_GRAD, ctx.needs_input_grad)
        given = [
            _cotangent(call, ctx.first_needs, name, x)
            for name, x in zip(Gradients._fields, cotangents, strict=True)
        ]
        grad_do, grad_dlse, *grads = FusedAttentionDoubleGrad.run(
            *given, do, dlse, lse, lse_low, *call, needs
        )
        # o and lse are functions of q, k and v: their share is part of grads.
        _, _, *placed = _placed(len(OF_GRAD), PLACES_OF_GRAD, grads, needs)
        return grad_do, None if dlse is None else grad_dlse, *placed


def _cotangent(call: Arguments, needs: int, name: str, given: Tensor | None) -> Tensor | None:
    """Returns a cotangent, or zeros, of dq, dk or dv; None for a gradient not in `needs`."""
    if name in NEEDS:
        return given if needs & NEEDS[name] else None
    return torch.zeros_like(getattr(call, name)) if given is None else given


class FusedAttentionDoubleGrad(Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return DOUBLE_BACKWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("clinattn: attention has no third derivative")


def _wants_gradient(call: Arguments) -> bool:
    if call.q.requires_grad or call.k.requires_grad or call.v.requires_grad:
        return True
    if call.mask is None and call.is_plain():
        return False
    added = (call.mask, call.decay, call.slopes, call.relative)
    return any(x is not None and x.requires_grad for x in added)


def attend(call: Arguments, backend: str) -> tuple[Tensor, ...]:
    """Returns (o, lse) of a complete and checked call."""
    split.refuse("a call of this form")
    differentiates = torch.is_grad_enabled() and _wants_gradient(call)
    if op_is_watched(call.q, call.k, call.v):
        o, lse, _ = _attend_watched(call, backend, differentiates)
    elif forward_ad._current_level >= 0:  # the op alone would drop tangents without a word
        o, lse, _ = FusedAttention.run(*call, backend, True)
    elif differentiates:
        alive = [x if x is None else unwrap_if_dead(x) for x in call.tensors()]
        call = Arguments._make([*alive, *call.scalars()])
        inputs = (call.q, call.k, call.v, call.mask, call.decay, call.slopes, call.relative)
        o, lse = DIRECT(*inputs, (call, backend))
    else:
        o, lse, _ = ops.forward(call, backend)
    if listeners.on and not torch.compiler.is_compiling():
        listeners.tell(call, o, lse)
    return o, lse


def _attend_watched(call: Arguments, backend: str, differentiates: bool) -> tuple[Tensor, ...]:
    """Returns (o, lse, lse_low) of a call that a compiler, a transform or a mode follows."""
    if torch.compiler.is_compiling():
        # torch.compile refuses a Function that gets the same tensor twice, as in self-attention.
        tensors = [x if x is None else x.view_as(x) for x in call.tensors()]
        return FusedAttention.apply(*tensors, *call.scalars(), backend, True)
    if (
        differentiates
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # the op alone would drop tangents without a word
    ):
        return FusedAttention.run(*call, backend, True)
    return FORWARD(*call, backend)
