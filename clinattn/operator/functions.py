"""FusedAttention, and the Functions of its derivatives."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from clinattn.backends.call import AT, NEEDS, TENSORS
from clinattn.operator import ops  # ops registers torch.ops.clinattn
from clinattn.operator.autograd import Function, op_is_watched
from clinattn.operator.visibility import unexpanded
from clinattn.operator.words import checks, feature_checks  # ops registers torch.ops.clinattn
from clinattn.operator.words.scalars import as_flag, as_float, as_int, as_size, at_most_far

FORWARD = torch.ops.clinattn.attention_forward.default
BACKWARD = torch.ops.clinattn.attention_backward.default
DOUBLE_BACKWARD = torch.ops.clinattn.attention_double_backward.default

N_TENSORS, N_ARGS = len(TENSORS), len(AT) + 1  # with `backend`
MASK, CU_SEQLENS, DECAY = AT["mask"], AT["cu_seqlens_q"], AT["decay"]
SCALE, MAX_SEQLEN_Q, MAX_SEQLEN_K = AT["scale"], AT["max_seqlen_q"], AT["max_seqlen_k"]


def _forward(*args: Any) -> tuple[Any, ...]:
    """The forward op, less 10 us of dispatch, and zeros for lse_low, where nobody watches."""
    return FORWARD(*args) if op_is_watched(*args[:3]) else ops.forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    """The backward op, less 15 us of dispatch where nobody watches."""
    return BACKWARD(*args) if op_is_watched(*args[5:8]) else ops.attention_backward(*args)


class FusedAttention(Function):
    """Attention with its gradients; `apply(q, k, v)` is the plain call and returns o.

    Further arguments are those of the op clinattn::attention_forward, in its order and with
    defaults; return_lse=True returns (o, lse, lse_low) with lse_low, which has no gradient, what
    rounding took from lse. fused_attention takes the user's words instead.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        # torch.compile does not come through here: it traces forward and backward themselves.
        if kwargs:
            bound = inspect.signature(cls.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        *complete, return_lse = _complete(*args)
        return_lse = as_flag("return_lse", return_lse)
        q, k, v, mask, cu_seqlens = complete[: CU_SEQLENS + 1]
        checks.check_tensors(q, k, v)
        check = checks.check_dense if cu_seqlens is None else checks.check_packed
        check(q, k, v, True)
        if mask is not None:
            checks.check_mask(mask, (*q.shape[:3], k.shape[2]), q.device)
            complete[MASK] = unexpanded(mask)
        if not torch.compiler.is_compiling():  # torch.export does, with what attend was given
            _check_numbers(complete, q)
        o, lse, lse_low = cls.run(*complete, True)
        if not return_lse:
            return o
        return o, lse, torch.zeros_like(lse) if lse_low is None else lse_low

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_lengths: Tensor | None = None,
        kv_start: Tensor | None = None,
        kv_end: Tensor | None = None,
        lo: Tensor | None = None,
        hi: Tensor | None = None,
        times: Tensor | None = None,
        decay: Tensor | None = None,
        slopes: Tensor | None = None,
        relative: Tensor | None = None,
        seed: Tensor | None = None,
        scale: float | None = None,
        window_left: int = -1,
        window_right: int = -1,
        bottom_right: bool = False,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softcap: float = 0,  # torch.compile(dynamic=True) makes a symbol of 0.0, not of 0
        global_prefix: int = 0,
        dropout_p: float = 0,
        backend: str = "",
        return_lse: bool = False,
    ) -> Any:
        if not isinstance(q, Tensor):
            # torch.compile without gradients puts a context before a call with defaults left out.
            assert mask is not None
            return FusedAttention.forward(k, v, mask)
        args = _complete(
            *(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, q_lengths, kv_start, kv_end, lo, hi),
            *(times, decay, slopes, relative, seed, scale, window_left, window_right),
            *(bottom_right, max_seqlen_q, max_seqlen_k, softcap, global_prefix, dropout_p),
            backend,
        )
        outputs = _forward(*args[:N_ARGS])
        return outputs if return_lse else outputs[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *args, return_lse = _complete(*inputs)
        o, lse, lse_low = output if return_lse else (output, None, None)
        ctx.set_materialize_grads(False)
        if lse_low is not None:
            ctx.mark_non_differentiable(lse_low)
        ctx.save_for_backward(*args[:N_TENSORS], o, lse, lse_low)
        ctx.scalars = args[N_TENSORS:]

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None = None, _: Any = None) -> Any:
        if do is None and dlse is None:
            return (None,) * (N_ARGS + 1)
        needs = _needs(ctx.needs_input_grad)
        grads = _gradients(do, dlse, ctx.saved_tensors, ctx.scalars, needs)
        return *_placed(grads, needs), None, None


def _check_numbers(args: list[Any], q: Tensor) -> None:
    """The other arguments of the op, in place."""
    args[SCALE] = checks.check_scale(args[SCALE], q.shape[-1], q.dtype)
    for name in ("window_left", "window_right"):
        side = as_int(name, args[AT[name]])
        if side < -1:
            raise ValueError(f"{name}: got {side}, expected >= 0, or -1 for no bound")
        args[AT[name]] = at_most_far(side)
    args[AT["bottom_right"]] = as_flag("bottom_right", args[AT["bottom_right"]])
    softcap = as_float("softcap", args[AT["softcap"]])
    args[AT["softcap"]] = feature_checks.check_softcap(softcap or None, q.dtype)
    for name, check in (
        ("global_prefix", lambda x: feature_checks.check_global_prefix(x, None)),
        ("dropout_p", feature_checks.check_dropout),
    ):
        args[AT[name]] = check(args[AT[name]])
    _check_parts(args, q)
    backend = args[-1]
    args[-1] = checks.check_backend(None if isinstance(backend, str) and not backend else backend)


def _check_parts(args: list[Any], q: Tensor) -> None:
    """Lengths, intervals and terms, as Arguments describes them."""
    packed, tokens = args[CU_SEQLENS] is not None, (q.shape[0],)
    k, heads, device = args[1], q.shape[1], q.device
    for side, x in (("q", q), ("k", k)):
        longest = AT[f"max_seqlen_{side}"]
        cu_seqlens = args[AT[f"cu_seqlens_{side}"]]
        if packed:
            args[longest] = checks.check_cu_seqlens(
                side, cu_seqlens, args[longest], x.shape[0], device
            )
        elif cu_seqlens is not None:
            raise ValueError(f"cu_seqlens_{side}: got one for q (B, H, N, D), expected None")
        else:
            args[longest] = as_size(f"max_seqlen_{side}", args[longest])
    batch = args[CU_SEQLENS].shape[0] - 1 if packed else q.shape[0]
    if packed and args[CU_SEQLENS + 1].shape[0] - 1 != batch:
        raise ValueError(f"cu_seqlens_k: expected the {batch} sequences of cu_seqlens_q")
    for name, x in (("q_lengths", q), ("kv_start", k), ("kv_end", k)):
        if args[AT[name]] is None:
            continue
        if packed:
            raise ValueError(f"{name}: got one with cu_seqlens, expected None")
        most = x.shape[-2]
        args[AT[name]] = checks.check_lengths(name, args[AT[name]], batch, most, device)
    rows = tokens if packed else (batch, q.shape[2])
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
        x = args[AT[name]]
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
        if (args[AT[one]] is None) != (args[AT[other]] is None):
            raise ValueError(f"{one} and {other}: got one of them, expected both or neither")
    if args[AT["seed"]] is None and args[AT["dropout_p"]] != 0:
        raise ValueError(f"seed: got None with dropout_p={args[AT['dropout_p']]}, expected one")


class DirectAttention(torch.autograd.Function):
    """FusedAttention where nobody watches, in less of the host's time: for few inputs.

    They are what can have a gradient, and `call`, all arguments of the op. Returns (o, lse).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        decay: Tensor | None,
        slopes: Tensor | None,
        relative: Tensor | None,
        call: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        o, lse, lse_low = ops.forward(*call)
        tensors = (*call[:N_TENSORS], o, lse, lse_low)
        ctx.set_materialize_grads(False)
        ctx.present = [at for at, x in enumerate(tensors) if x is not None]
        ctx.save_for_backward(*[x for x in tensors if x is not None])
        ctx.scalars = call[N_TENSORS:]
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        if do is None and dlse is None:
            return (None,) * (len(NEEDS) + 4)
        saved: list[Tensor | None] = [None] * (N_TENSORS + 3)
        for at, x in zip(ctx.present, ctx.saved_tensors, strict=True):
            saved[at] = x
        bits = NEEDS.values()
        needs = sum([bit for bit, x in zip(bits, ctx.needs_input_grad[3:], strict=False) if x])
        grads = _gradients(do, dlse, saved, ctx.scalars, needs)
        if needs == 0:
            return *grads[:3], *[None] * (len(NEEDS) + 1)
        more = [x if needs & bit else None for bit, x in zip(bits, grads[3:], strict=True)]
        return *grads[:3], *more, None


# Function.apply, less what concerns transforms
DIRECT = super(torch.autograd.Function, DirectAttention).apply


def _gradients(
    do: Tensor | None, dlse: Tensor | None, saved: Any, scalars: Any, needs: int
) -> tuple[Tensor, ...]:
    """What the backward op gives, once more differentiable where that can be asked for."""
    *tensors, o, lse, lse_low = saved
    args = (*tensors, *scalars)
    if lse is None:  # a compiled apply(q, k, v), whose forward has no second output
        o, lse, lse_low = _forward(*args)
    do = torch.zeros_like(o) if do is None else do
    # What is not differentiated again, as a compiled graph, needs no Function around the op.
    once = torch.compiler.is_compiling() or not (
        torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    )
    grad = _backward if once else FusedAttentionGrad.run
    return grad(do, dlse, o, lse, lse_low, *args[:-1], needs, args[-1])


def _needs(wanted: tuple[bool, ...]) -> int:
    """The bits of NEEDS, from what is wanted of each argument; those left out may be missing."""
    return sum(bit for name, bit in NEEDS.items() if AT[name] < len(wanted) and wanted[AT[name]])


def _placed(grads: Any, needs: int) -> list[Tensor | None]:
    """(dq, dk, dv, and those of NEEDS) where the arguments stand."""
    placed = [*grads[:3], *[None] * (len(AT) - 3)]
    for (name, bit), grad in zip(NEEDS.items(), grads[3:], strict=True):
        if needs & bit:
            placed[AT[name]] = grad
    return placed


DEFAULTS = (None, None, None, *(FusedAttention.forward.__defaults__ or ()))


def _complete(*given: Any) -> list[Any]:
    """All arguments of FusedAttention, with defaults where they are left out or None."""
    args = [*given, *DEFAULTS[len(given) :]]
    tokens = 2 if args[CU_SEQLENS] is None else 0
    if args[SCALE] is None:
        args[SCALE] = args[0].shape[-1] ** -0.5
    if args[MAX_SEQLEN_Q] is None:
        args[MAX_SEQLEN_Q] = args[0].shape[tokens]
    if args[MAX_SEQLEN_K] is None:
        args[MAX_SEQLEN_K] = args[1].shape[tokens]
    return args


class FusedAttentionGrad(Function):
    """The backward op, itself differentiable once more."""

    @staticmethod
    def forward(
        do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        """args: lse_low, then those of the forward op, with `needs` before the backend."""
        return _backward(do, dlse, o, lse, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        do, dlse, _, lse, lse_low, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(do, dlse, lse, lse_low, *args[:N_TENSORS])
        ctx.scalars = args[N_TENSORS:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(x is None for x in cotangents):
            return (None,) * (5 + N_ARGS + 1)
        do, dlse, lse, lse_low, *tensors = ctx.saved_tensors
        *scalars, first_needs, _ = ctx.scalars
        needs = _needs(ctx.needs_input_grad[5:])
        given: list[Tensor | None] = [
            torch.zeros_like(x) if ct is None else ct
            for x, ct in zip(tensors[:3], cotangents[:3], strict=True)
        ]
        given += [
            ct if first_needs & bit else None
            for bit, ct in zip(NEEDS.values(), cotangents[3:], strict=True)
        ]
        args = (do, dlse, lse, lse_low, *tensors, *scalars, needs)
        grad_do, grad_dlse, *grads = FusedAttentionDoubleGrad.run(*given, *args)
        # o and lse are functions of q, k and v: their share is part of grads.
        grad_dlse = None if dlse is None else grad_dlse
        return grad_do, grad_dlse, None, None, None, *_placed(grads, needs), None, None


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


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    q, k, v, mask = args[: MASK + 1]
    decay, slopes, relative = args[DECAY : DECAY + 3]
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    if mask is decay is slopes is relative is None:
        return False
    return any(x is not None and x.requires_grad for x in (mask, decay, slopes, relative))


def attend(*args: Any) -> tuple[Tensor, ...]:
    """(o, lse) of complete and checked arguments."""
    q, k, v = args[:3]
    if torch.compiler.is_compiling():
        # torch.compile refuses a Function that gets the same tensor twice, as in self-attention.
        tensors = [x if x is None else x.view_as(x) for x in args[:N_TENSORS]]
        return FusedAttention.apply(*tensors, *args[N_TENSORS:], True)[:2]
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # the op alone would drop tangents without a word
    ):
        return FusedAttention.run(*args, True)[:2]
    if not (torch.is_grad_enabled() and _wants_gradient(args)):
        return _forward(*args)[:2]
    if op_is_watched(q, k, v):
        return FusedAttention.run(*args, True)[:2]
    call = (*[x if x is None else unwrap_if_dead(x) for x in args[:N_TENSORS]], *args[N_TENSORS:])
    return DIRECT(*call[: MASK + 1], *call[DECAY : DECAY + 3], call)
