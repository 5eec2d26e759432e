"""Op contracts: schemas, fakes, vmap rules, FLOP formulas, and routing to a backend.

attention_forward and attention_backward are opaque to autograd; clinattn.attention differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from clinattn import reference
from clinattn.backends import implementation, refuse_extension
from clinattn.visibility import visible_pairs

# Dense: q (B,H,Nq,D), k v (B,Hkv,Nk,D). Packed: q (Tq,H,D), k v (Tk,Hkv,D), cu_seqlens (S+1,).
ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? q_lengths, Tensor? kv_start, Tensor? kv_end, float scale, int window_left, "
    "int window_right, bool bottom_right, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
# lse_low is what rounding took from lse. The backward pass needs it: 2^(s - lse) for scores of 1e4
# would otherwise be off by the rounding of lse, 5e-4 in fp32.
RESULTS = "(Tensor o, Tensor lse, Tensor lse_low)"
GRAD_ARGS = "Tensor do, Tensor? dlse, Tensor o, Tensor lse, Tensor? lse_low"

SCHEMAS = {
    "attention_forward": f"({ARGS}, str backend) -> {RESULTS}",
    "attention_backward": f"({GRAD_ARGS}, {ARGS}, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    "attention_double_backward": "(Tensor ddq, Tensor ddk, Tensor ddv, Tensor do, Tensor? dlse, "
    f"Tensor lse, Tensor? lse_low, {ARGS})"
    " -> (Tensor grad_do, Tensor grad_dlse, Tensor dq, Tensor dk, Tensor dv)",
    "cpu_forward": f"({ARGS}) -> {RESULTS}",
    "cpu_backward": f"({GRAD_ARGS}, {ARGS}) -> (Tensor dq, Tensor dk, Tensor dv)",
}

LIB = torch.library.Library("clinattn", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    try:
        LIB.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError:  # its kernel is registered already, with other arguments or results
        if not _name.startswith("cpu_"):
            raise
        refuse_extension("the compiled module clinattn._C was built from another version")


def lse_like(q: Tensor, packed: bool) -> Tensor:
    """Unwritten lse for q: (B, H, Nq), or (H, Tq) when packed."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:-1]
    return q.new_empty(shape, dtype=dtype)


def with_unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Route to a backend, which may rely on sizes that are not 0 and a last stride of 1."""
    args, backend = rest[:-1], rest[-1]
    if q.numel() == 0 or k.numel() == 0:
        lse = lse_like(q, packed=args[1] is not None)
        return q.new_zeros(q.shape), lse.fill_(-float("inf")), torch.zeros_like(lse)
    q, k, v = with_unit_last_stride(q), with_unit_last_stride(k), with_unit_last_stride(v)
    return implementation(backend, q).forward(q, k, v, *args)


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
) -> tuple[Tensor, Tensor, Tensor]:
    args, backend = rest[:-1], rest[-1]
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    do, q, k, v = (with_unit_last_stride(x) for x in (do, q, k, v))
    dlse = None if dlse is None else dlse.contiguous()
    return implementation(backend, q).backward(do, dlse, o, lse, lse_low, q, k, v, *args)


def forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lse = lse_like(q, packed=rest[1] is not None)
    return q.new_empty(q.shape), lse, torch.empty_like(lse)


def backward_fake(do, dlse, o, lse, lse_low, q, k, v, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def double_backward_fake(
    ddq, ddk, ddv, do, dlse, lse, lse_low, q, k, v, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = backward_fake(do, dlse, do, lse, lse_low, q, k, v, *rest)
    return q.new_empty(q.shape), lse_like(q, packed=rest[1] is not None), *grads


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
}
for _name, _function in IMPLEMENTATIONS.items():
    LIB.impl(_name, _function, "CompositeExplicitAutograd")
for _name, _fake in FAKES.items():
    if hasattr(torch.ops.clinattn, _name):
        torch.library.register_fake(f"clinattn::{_name}", _fake, lib=LIB)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(V, B, ...) -> (V * B, ...), where an unbatched x is shared by all V."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    if mask is None or (dim is None and mask.shape[0] == 1):
        return mask
    if dim is not None:
        mask = mask.movedim(dim, 0).expand(-1, batch, -1, -1, -1)
        dim = 0
    return _fold(mask, dim, size)


def _vmap_rule(name: str, first: int) -> Any:
    """A vmap rule that folds the new dimension into the batch; argument `first` is q."""
    op = getattr(torch.ops.clinattn, name).default
    mask_at, packed_at, scalars_at = first + 3, first + 4, first + 9

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if args[packed_at] is not None:
            raise NotImplementedError(
                "clinattn: vmap over the packed layout (cu_seqlens) is not defined; "
                "use the dense layout (B, H, N, D) with lengths"
            )
        size = info.batch_size
        dims = in_dims[:scalars_at]
        folded = [_fold(x, d, size) for x, d in zip(args, dims, strict=False)]
        q, q_dim = args[first], in_dims[first]
        batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
        folded[mask_at] = _fold_mask(args[mask_at], in_dims[mask_at], size, batch)
        results = op(*folded, *args[scalars_at:])
        return tuple(r.unflatten(0, (size, batch)) for r in results), (0,) * len(results)

    return rule


for _name, _first in (
    ("attention_forward", 0),
    ("attention_backward", 5),
    ("attention_double_backward", 7),
):
    torch.library.register_vmap(f"clinattn::{_name}", _vmap_rule(_name, _first), lib=LIB)


@register_flop_formula(torch.ops.clinattn.attention_forward, get_raw=True)
def forward_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any) -> int:
    """4 D for each visible (query, key) pair of each head: two multiply-adds per element."""
    return 4 * q.shape[-1] * q.shape[1] * visible_pairs(q, k, *rest[:10])


@register_flop_formula(torch.ops.clinattn.attention_backward, get_raw=True)
def backward_flops(do, dlse, o, lse, lse_low, q, k, v, *rest: Any, **kwargs: Any) -> int:
    """10 D for each visible pair: scores again, then do.v, dv, dq and dk."""
    return 10 * q.shape[-1] * q.shape[1] * visible_pairs(q, k, *rest[:10])
