"""Op contracts: schemas, fakes, vmap rules, and routing to a backend; flops.py counts their work.

attention_forward and attention_backward are opaque to autograd; clinattn.functions differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinattn import ranges, reference
from clinattn.after_import import after_import
from clinattn.arguments import AT, NEEDS, SCHEMA, TENSORS
from clinattn.backends import asked_for, implementation, matmul_precision

# lse_low is what rounding took from lse. The backward pass needs it: 2^(s - lse) for scores of 1e4
# would otherwise be off by the rounding of lse, 5e-4 in fp32.
RESULTS = "(Tensor o, Tensor lse, Tensor lse_low)"
GRAD_ARGS = "Tensor do, Tensor? dlse, Tensor o, Tensor lse, Tensor? lse_low"
# `needs` says which of the last four are wanted (arguments.NEEDS); the others are empty.
GRADS = (
    "Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor ddecay, Tensor dslopes, Tensor drelative"
)
PRECISION = "int precision=0"  # of backends.PRECISIONS

SCHEMAS = {
    "attention_forward": f"({SCHEMA}, str backend) -> {RESULTS}",
    "attention_backward": f"({GRAD_ARGS}, {SCHEMA}, int needs, str backend) -> ({GRADS})",
    "attention_double_backward": "(Tensor ddq, Tensor ddk, Tensor ddv, Tensor? ddmask, "
    "Tensor? dddecay, Tensor? ddslopes, Tensor? ddrelative, Tensor do, Tensor? dlse, Tensor lse, "
    f"Tensor? lse_low, {SCHEMA}, int needs) -> (Tensor grad_do, Tensor grad_dlse, {GRADS})",
    "cpu_forward": f"({SCHEMA}, {PRECISION}) -> {RESULTS}",
    "cpu_backward": f"({GRAD_ARGS}, {SCHEMA}, int needs, {PRECISION}) -> ({GRADS})",
    "cuda_forward": f"({SCHEMA}) -> {RESULTS}",
    "cuda_backward": f"({GRAD_ARGS}, {SCHEMA}, int needs) -> ({GRADS})",
}

LIB = torch.library.Library("clinattn", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    LIB.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def lse_like(q: Tensor, packed: bool) -> Tensor:
    """Unwritten lse for q: (B, H, Nq), or (H, Tq) when packed."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:-1]
    return q.new_empty(shape, dtype=dtype)


def with_unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_gradients(q: Tensor, needs: int, *args: Any) -> list[Tensor]:
    """Unwritten gradients of NEEDS, with 0 elements where they are not wanted."""
    grads = []
    for name, bit in NEEDS.items():
        like = args[AT[name]] if needs & bit else None
        grads.append(q.new_empty(0) if like is None else like.new_empty(like.shape))
    return grads


def attention_forward(*args: Any) -> tuple[Tensor, ...]:
    o, lse, lse_low = forward(*args)
    return o, lse, torch.zeros_like(lse) if lse_low is None else lse_low


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Route to a backend, which may rely on sizes that are not 0 and a last stride of 1.

    Returns the results of the op, with None for an lse_low that would be zeros.
    """
    args, backend = rest[:-1], rest[-1]
    if q.numel() == 0 or k.numel() == 0:
        lse = lse_like(q, packed=args[1] is not None)
        return q.new_zeros(q.shape), lse.fill_(-float("inf")), None
    q, k, v = with_unit_last_stride(q), with_unit_last_stride(k), with_unit_last_stride(v)
    chosen = implementation(backend, q, asked_for(0, *args))
    if chosen.takes_precision and (precision := matmul_precision()):
        args = (*args, precision)
    if ranges.on:
        return ranges.run(f"attention forward, {chosen.name}", chosen.forward, q, k, v, *args)
    return chosen.forward(q, k, v, *args)


def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    args, needs, backend = rest[:-2], rest[-2], rest[-1]
    if q.numel() == 0 or k.numel() == 0:
        empty = empty_gradients(q, needs, q, k, v, *args)
        return *(x.new_zeros(x.shape) for x in (q, k, v)), *(x.zero_() for x in empty)
    do, q, k, v = (with_unit_last_stride(x) for x in (do, q, k, v))
    dlse = None if dlse is None else dlse.contiguous()
    asked = asked_for(needs, *args)
    chosen = implementation(backend, q, asked, backward=True)
    complete = (do, dlse, o, lse, lse_low, q, k, v, *args, needs)
    if chosen.takes_precision and (precision := matmul_precision()):
        complete = (*complete, precision)
    if ranges.on:
        return ranges.run(f"attention backward, {chosen.name}", chosen.backward, *complete)
    return chosen.backward(*complete)


def forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lse = lse_like(q, packed=rest[1] is not None)
    return q.new_empty(q.shape), lse, torch.empty_like(lse)


def gradients_fake(args: Any, needs: int) -> tuple[Tensor, ...]:
    q, k, v = args[:3]
    empty = empty_gradients(q, needs, *args)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *empty


def backward_fake(do, dlse, o, lse, lse_low, *rest: Any) -> tuple[Tensor, ...]:
    return gradients_fake(rest, rest[len(AT)])


def double_backward_fake(
    ddq, ddk, ddv, ddmask, dddecay, ddslopes, ddrelative, do, dlse, lse, lse_low, *rest: Any
) -> tuple[Tensor, ...]:
    q, packed = rest[0], rest[AT["cu_seqlens_q"]] is not None
    return q.new_empty(q.shape), lse_like(q, packed), *gradients_fake(rest, rest[-1])


IMPLEMENTATIONS = {
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "attention_double_backward": reference.attention_double_backward,
}
FAKES: dict[str, Callable[..., Any]] = {
    "attention_forward": forward_fake,
    "attention_backward": backward_fake,
    "attention_double_backward": double_backward_fake,
    "cpu_forward": forward_fake,
    "cpu_backward": backward_fake,
    "cuda_forward": forward_fake,
    "cuda_backward": backward_fake,
}
for _name, _function in IMPLEMENTATIONS.items():
    LIB.impl(_name, _function, "CompositeExplicitAutograd")
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"clinattn::{_name}", _fake, lib=LIB)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(V, B, ...) -> (V * B, ...), where an unbatched x is shared by all V."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_broadcast(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """_fold of a tensor whose batch may be 1."""
    if x is None or (dim is None and x.shape[0] == 1):
        return x
    if dim is not None:
        x = x.movedim(dim, 0)
        x, dim = x.expand(-1, batch, *x.shape[2:]), 0
    return _fold(x, dim, size)


def _is_folded(first: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    """Whether a batch with the new dimension folded in is the same problem.

    Not where every sample wants its own gradient of what the batch shares, or its own dropout.
    """
    needs = args[first + len(AT)] if first > 0 else 0
    apart = any(in_dims[first + AT[name]] is not None for name in ("decay", "relative"))
    return not (needs or apart or args[first + AT["seed"]] is not None)


def _vmap_rule(name: str, first: int) -> Any:
    """A vmap rule that folds the new dimension into the batch; argument `first` is q."""
    op = getattr(torch.ops.clinattn, name).default
    mask_at, slopes_at, scalars_at = first + AT["mask"], first + AT["slopes"], first + len(TENSORS)
    shared = [first + AT[name] for name in ("decay", "relative", "seed")]

    def one_by_one(size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
        results = [
            op(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
        stacked = tuple(torch.stack(x) for x in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if args[first + AT["cu_seqlens_q"]] is not None:
            raise NotImplementedError(
                "clinattn: vmap over the packed layout (cu_seqlens) is not defined; "
                "use the dense layout (B, H, N, D) with lengths"
            )
        size = info.batch_size
        if not _is_folded(first, in_dims, args):
            return one_by_one(size, in_dims, args)
        dims = in_dims[:scalars_at]
        q, q_dim = args[first], in_dims[first]
        batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
        folded = [
            x if at in shared else _fold(x, d, size)
            for at, (x, d) in enumerate(zip(args, dims, strict=False))
        ]
        for at in (mask_at, slopes_at):
            folded[at] = _fold_broadcast(args[at], in_dims[at], size, batch)
        results = op(*folded, *args[scalars_at:])
        # gradients that nobody wants have no batch
        unfolded = [
            r.unflatten(0, (size, batch)) if r.dim() > 1 else r.expand(size, 0) for r in results
        ]
        return tuple(unfolded), (0,) * len(results)

    return rule


for _name, _first in (
    ("attention_forward", 0),
    ("attention_backward", 5),
    ("attention_double_backward", 11),
):
    torch.library.register_vmap(f"clinattn::{_name}", _vmap_rule(_name, _first), lib=LIB)


# Its module brings Triton along, which takes longer to import than all of this package.
after_import("torch.utils.flop_counter", "clinattn.flops")
