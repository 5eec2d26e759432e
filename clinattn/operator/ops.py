"""The ops: schemas, fakes, vmap rules, and the call of a backend; flops.py counts their work.

They are opaque to autograd; functions.py differentiates attention_forward and attention_backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import (
    ENTROPY,
    NEEDS,
    TENSORS,
    TOPK,
    Arguments,
    Gradients,
    Incoming,
    Summary,
    schema_of,
)
from clinattn.backends.reference import attention as reference
from clinattn.backends.select import SUMMARIES, asked_for, implementation
from clinattn.operator import ranges
from clinattn.operator.after_import import after_import

RESULTS = "(Tensor o, Tensor lse, Tensor lse_low)"
CALL, INCOMING = schema_of(Arguments), schema_of(Incoming)
SUMMARY = f"{schema_of(Summary)}, {CALL}, int reduce, int top"
# `needs` says which of the last four are computed (call.NEEDS); the others are empty.
GRADS = ", ".join(f"Tensor d{name}" for name in Gradients._fields)
SECOND = schema_of(Gradients).replace("Tensor ", "Tensor dd").replace("Tensor? ", "Tensor? dd")
PRECISION = "int precision=0"  # of cpu.PRECISIONS
# A bare call; an op with all arguments takes 3 us more. Nothing traces these ops, so they have no
# fakes: tensors without data are refused.
BARE = "Tensor q, Tensor k, Tensor v, bool is_causal, float? scale"

# Arguments and results of each op.
SIGNATURES = {
    "attention_forward": (f"{CALL}, str backend", RESULTS),
    "attention_backward": (f"{INCOMING}, {CALL}, int needs, str backend", f"({GRADS})"),
    "attention_double_backward": (
        f"{SECOND}, Tensor do, Tensor? dlse, Tensor lse, Tensor? lse_low, {CALL}, int needs",
        f"(Tensor grad_do, Tensor grad_dlse, {GRADS})",
    ),
    "attention_summary": (f"{SUMMARY}, str backend", "(Tensor values, Tensor places)"),
    "cpu_forward": (f"{CALL}, {PRECISION}", RESULTS),
    "cpu_backward": (f"{INCOMING}, {CALL}, int needs, {PRECISION}", f"({GRADS})"),
    "cpu_bare_output": (f"{BARE}, {PRECISION}", "Tensor o"),
    "cpu_bare_forward": (f"{BARE}, {PRECISION}", RESULTS),
    "cpu_bare_backward": (
        f"Tensor do, Tensor o, Tensor lse, Tensor lse_low, {BARE}, {PRECISION}",
        "(Tensor dq, Tensor dk, Tensor dv)",
    ),
    "cpu_summary": (f"{SUMMARY}, {PRECISION}", "(Tensor values, Tensor places)"),
    "cuda_forward": (CALL, RESULTS),
    "cuda_backward": (f"{INCOMING}, {CALL}, int needs", f"({GRADS})"),
    "cuda_summary": (SUMMARY, "(Tensor values, Tensor places)"),
}
# The names of the arguments of each op.
NAMES = {
    name: [x.split()[-1].partition("=")[0] for x in arguments.split(", ")]
    for name, (arguments, _) in SIGNATURES.items()
}

LIB = torch.library.Library("clinattn", "FRAGMENT")
for _name, (_arguments, _results) in SIGNATURES.items():
    LIB.define(f"{_name}({_arguments}) -> {_results}", tags=(torch.Tag.pt2_compliant_tag,))


def lse_like(q: Tensor, packed: bool) -> Tensor:
    """Returns an unwritten lse for q: (B, H, Nq), or (H, Tq) when packed."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:-1]
    return q.new_empty(shape, dtype=dtype)


def output_like(q: Tensor, v: Tensor) -> Tensor:
    """Returns an unwritten o: as q, and as wide as v."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def with_unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_gradients(needs: int, q: Tensor, added: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns unwritten gradients of NEEDS, with 0 elements where `needs` leaves them out."""
    grads = []
    for bit, x in zip(NEEDS.values(), added, strict=True):
        grads.append(q.new_empty(0) if x is None or not needs & bit else x.new_empty(x.shape))
    return grads


def forward(call: Arguments, backend: str) -> tuple[Any, ...]:
    """Has a backend compute the call; it may rely on q and k with elements and last strides of 1.

    Returns the results of the op, where None stands for an lse_low of zeros.
    """
    q, k = call.q, call.k
    if q.numel() == 0 or k.numel() == 0:
        lse = lse_like(q, call.is_packed())
        return output_like(q, call.v).zero_(), lse.fill_(-float("inf")), None
    call = with_unit_last_strides(call)
    chosen = implementation(backend, q, asked_for(call, 0))
    if ranges.on:
        return ranges.run(f"attention forward, {chosen.name}", chosen.forward, call)
    return chosen.forward(call)


def backward(call: Arguments, incoming: Incoming, needs: int, backend: str) -> tuple[Tensor, ...]:
    """Has a backend compute the gradients; it may rely on the same, and on a contiguous dlse."""
    q, k = call.q, call.k
    if q.numel() == 0 or k.numel() == 0:
        empty = empty_gradients(needs, q, [getattr(call, name) for name in NEEDS])
        return *(x.new_zeros(x.shape) for x in (q, k, call.v)), *(x.zero_() for x in empty)
    call = with_unit_last_strides(call)
    incoming = with_read_cotangents(incoming)
    chosen = implementation(backend, q, asked_for(call, needs), backward=True)
    if ranges.on:
        name = f"attention backward, {chosen.name}"
        return ranges.run(name, chosen.backward, call, incoming, needs)
    return chosen.backward(call, incoming, needs)


def summary(
    call: Arguments, inputs: Summary, reduce: int, top: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Has a backend summarise the weights; it may rely on the same, and on contiguous inputs."""
    if call.q.numel() == 0 or call.k.numel() == 0:
        values, places = summary_like(call, reduce, top)
        return values.zero_(), places.fill_(-1)
    call = with_unit_last_strides(call)
    lse, lse_low, weights = (
        x if x is None else x.contiguous() for x in (inputs.lse, inputs.lse_low, inputs.weights)
    )
    do = None if inputs.do is None else with_unit_last_stride(inputs.do)
    chosen = implementation(backend, call.q, (*asked_for(call, 0), SUMMARIES))
    assert lse is not None and chosen.summary is not None
    inputs = Summary(lse, lse_low, weights, do)
    if ranges.on:
        name = f"attention summary, {chosen.name}"
        return ranges.run(name, chosen.summary, call, inputs, reduce, top)
    return chosen.summary(call, inputs, reduce, top)


def summary_like(call: Arguments, reduce: int, top: int) -> tuple[Tensor, Tensor]:
    """Returns unwritten results of a summary."""
    packed = call.is_packed()
    values = lse_like(call.q, packed)
    if reduce < ENTROPY:
        keys = call.k.shape[0 if packed else 2]
        values = values.new_empty((*values.shape[:-1], keys))
    elif reduce == TOPK:
        values = values.new_empty((*values.shape, top))
    shape = values.shape if reduce == TOPK else (0,)
    return values, values.new_empty(shape, dtype=torch.int64)


def with_unit_last_strides(call: Arguments) -> Arguments:
    q, k, v = call.q, call.k, call.v
    if q.is_contiguous() and k.is_contiguous() and v.is_contiguous():  # a third of the time
        return call
    if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return call
    q, k, v = map(with_unit_last_stride, (q, k, v))
    return call._replace(q=q, k=k, v=v)


def with_read_cotangents(incoming: Incoming) -> Incoming:
    """Returns the record with a do whose last stride is 1, and a contiguous dlse."""
    do, dlse = with_unit_last_stride(incoming.do), incoming.dlse
    if do is incoming.do and dlse is None:
        return incoming
    return incoming._replace(do=do, dlse=None if dlse is None else dlse.contiguous())


def attention_forward(*args: Any) -> tuple[Tensor, ...]:
    *row, backend = args
    o, lse, lse_low = forward(Arguments(*row), backend)
    return o, lse, torch.zeros_like(lse) if lse_low is None else lse_low


def attention_backward(do, dlse, o, lse, lse_low, *args: Any) -> tuple[Tensor, ...]:
    *row, needs, backend = args
    return backward(Arguments(*row), Incoming(do, dlse, o, lse, lse_low), needs, backend)


def attention_double_backward(*args: Any) -> tuple[Tensor, ...]:
    ddq, ddk, ddv, ddmask, dddecay, ddslopes, ddrelative, do, dlse, lse, lse_low, *row, needs = args
    cotangents = Gradients(ddq, ddk, ddv, ddmask, dddecay, ddslopes, ddrelative)
    call = Arguments(*row)
    return reference.attention_double_backward(call, cotangents, do, dlse, lse, lse_low, needs)


def attention_summary(lse, lse_low, weights, do, *args: Any) -> tuple[Tensor, Tensor]:
    *row, reduce, top, backend = args
    inputs = Summary(lse, lse_low, weights, do)
    return summary(Arguments(*row), inputs, reduce, top, backend)


def forward_fake(q: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, **_: Any) -> tuple[Tensor, ...]:
    lse = lse_like(q, packed=cu_seqlens_q is not None)
    return output_like(q, v), lse, torch.empty_like(lse)


def backward_fake(q: Tensor, k: Tensor, v: Tensor, needs: int, **row: Any) -> tuple[Tensor, ...]:
    empty = empty_gradients(needs, q, [row[name] for name in NEEDS])
    return *(x.new_empty(x.shape) for x in (q, k, v)), *empty


def double_backward_fake(**row: Any) -> tuple[Tensor, ...]:
    grad_do, grad_dlse, _ = forward_fake(**row)
    return grad_do, grad_dlse, *backward_fake(**row)


def summary_fake(reduce: int, top: int, **row: Any) -> tuple[Tensor, Tensor]:
    call = Arguments(**{name: row[name] for name in Arguments._fields})
    return summary_like(call, reduce, top)


IMPLEMENTATIONS = {
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "attention_double_backward": attention_double_backward,
    "attention_summary": attention_summary,
}
FAKES: dict[str, Callable[..., Any]] = {
    "attention_forward": forward_fake,
    "attention_backward": backward_fake,
    "attention_double_backward": double_backward_fake,
    "attention_summary": summary_fake,
    "cpu_forward": forward_fake,
    "cpu_backward": backward_fake,
    "cuda_forward": forward_fake,
    "cuda_backward": backward_fake,
    "cpu_summary": summary_fake,
    "cuda_summary": summary_fake,
}


def _by_name(names: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets torch call a function of keywords by position, without defaults at the end."""
    return lambda *args: function(**dict(zip(names, args, strict=False)))


for _name, _function in IMPLEMENTATIONS.items():
    LIB.impl(_name, _function, "CompositeExplicitAutograd")
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"clinattn::{_name}", _by_name(NAMES[_name], _fake), lib=LIB)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(V, B, ...) -> (V * B, ...), where an unbatched x is shared by all V."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_broadcast(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """Folds a tensor whose batch may be 1, as _fold does."""
    if x is None or (dim is None and x.shape[0] == 1):
        return x
    if dim is not None:
        x = x.movedim(dim, 0)
        x, dim = x.expand(-1, batch, *x.shape[2:]), 0
    return _fold(x, dim, size)


def _is_folded(row: dict[str, Any], dims: dict[str, Any]) -> bool:
    """Returns whether the new dimension can be folded into the batch.

    It cannot where each sample has its own decay or relative bias, its own gradient of a tensor
    that the batch shares, or its own dropout.
    """
    apart = dims["decay"] is not None or dims["relative"] is not None
    return not (row.get("needs") or apart or row["seed"] is not None)


def _vmap_rule(name: str) -> Any:
    """Returns a vmap rule that folds the new dimension into the batch where that is possible."""
    op, names = getattr(torch.ops.clinattn, name).default, NAMES[name]
    shared = {*Arguments._fields, "needs", "reduce", "top", "backend"} - {*TENSORS}
    shared |= {"decay", "relative", "seed"}
    broadcast = {"mask", "slopes"}

    def one_by_one(size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
        results = [
            op(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
        stacked = tuple(torch.stack(x) for x in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        row = dict(zip(names, args, strict=True))
        dims = dict(zip(names, in_dims, strict=True))
        if row["cu_seqlens_q"] is not None:
            raise NotImplementedError(
                "clinattn: vmap over the packed layout (cu_seqlens) is not defined; "
                "use the dense layout (B, H, N, D) with lengths"
            )
        size = info.batch_size
        if not _is_folded(row, dims):
            return one_by_one(size, in_dims, args)
        q, q_dim = row["q"], dims["q"]
        batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
        for x in names:
            if x in broadcast:
                row[x] = _fold_broadcast(row[x], dims[x], size, batch)
            elif x not in shared:
                row[x] = _fold(row[x], dims[x], size)
        results = op(*row.values())
        # gradients that `needs` leaves out have no batch
        unfolded = [
            r.unflatten(0, (size, batch)) if r.dim() > 1 else r.expand(size, 0) for r in results
        ]
        return tuple(unfolded), (0,) * len(results)

    return rule


for _name in IMPLEMENTATIONS:
    torch.library.register_vmap(f"clinattn::{_name}", _vmap_rule(_name), lib=LIB)


# operator.flops imports Triton, which takes longer than to import all of this package.
after_import("torch.utils.flop_counter", "clinattn.operator.flops")
