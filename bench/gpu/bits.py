"""Stage of run.py that checks the bits of a sequence: its neighbours and its padding change none.

A sequence alone is the yardstick. The same one comes in a padded batch with lengths, behind a key
mask with padding on the right or on the left, and packed with others; what is padding is NaN. The
two forward kernels of 16-bit calls on Hopper are also held against each other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from clinattn import fused_attention, fused_attention_varlen
from clinattn.backends.call import Arguments
from clinattn.backends.triton import triton_interpreter
from clinattn.kernels import forward
from clinattn.operator import visibility
from gpu.rows import Run, outcome

Results = list[Tensor]  # o, lse, dq, dk, dv

NAMES = ("o", "lse", "dq", "dk", "dv")
LENGTHS, DRYRUN_LENGTHS = (4096, 1000, 8192), (20, 7)
EXTRA = 24  # rows of padding after the longest sequence
HEADS = (4, 2)  # of queries and of keys
# (dtype, D, causal), the most decisive first. Types of 16 bits share kernels, fp32 has its own.
KINDS: tuple[tuple[str, int, bool], ...] = (
    ("bfloat16", 128, False),
    ("bfloat16", 128, True),
    ("bfloat16", 64, False),
    ("bfloat16", 64, True),
    ("float16", 128, True),
    ("float32", 64, True),
)
DRYRUN_KINDS = (("float16", 16, True),)
# N of the two kernels' comparison: of one tile, of an odd number of them, and with an edge.
SIZES = (128, 1000, 4096, 8192)


def bits(run: Run) -> None:
    if "triton" in run.backends and not triton_interpreter():
        for dtype, n, causal in itertools.product(
            (torch.bfloat16, torch.float16), SIZES, (False, True)
        ):
            case = f"two kernels {str(dtype)[6:]} n={n} {'causal' if causal else 'full'}"
            run.row(backend="triton", case=case, **of_two_kernels(dtype, n, causal, run.device))
    kinds, lengths = (DRYRUN_KINDS, DRYRUN_LENGTHS) if run.dryrun else (KINDS, LENGTHS)
    for kind, backend in itertools.product(kinds, run.backends):
        if not run.enough_time(5, f"{backend} {kind}"):
            return
        dtype, dim, causal = kind
        members = sequences(lengths, getattr(torch, dtype), dim, run.device)
        keywords = {"backend": backend, "is_causal": causal}
        words = f"{dtype} {dim} {'causal' if causal else 'full'}"
        try:
            expected = [alone(member, keywords) for member in members]
        except Exception as error:
            run.row(backend=backend, case=words, ok=False, error=str(error)[:300])
            continue
        for name, form in FORMS.items():
            result: dict[str, Any] = {}
            check = functools.partial(compare, form, members, keywords, expected, result)
            run.row(backend=backend, case=f"{words} {name}", **{**outcome(check), **result})


def compare(
    form: Callable[..., list[Results]],
    members: list[list[Tensor]],
    keywords: dict[str, Any],
    expected: list[Results],
    result: dict[str, Any],
) -> None:
    """Puts into result whether all bits are equal, and otherwise how many values differ."""
    result |= difference(form(members, keywords), expected)


def difference(actual: list[Results], expected: list[Results]) -> dict[str, Any]:
    """ok; and differing values and the largest difference, by result, where there are any."""
    differing: dict[str, int] = {}
    largest: dict[str, float] = {}
    for results, wanted in zip(actual, expected, strict=True):
        for name, x, y in zip(NAMES, results, wanted, strict=False):
            count = int(((x != y) & ~(x.isnan() & y.isnan())).sum())
            if count:
                differing[name] = differing.get(name, 0) + count
                far = (x.double() - y.double()).abs().max().item()
                largest[name] = max(largest.get(name, 0.0), far)
    nans = any(bool(x[0].isnan().any()) for x in expected)
    if not differing and not nans:
        return {"ok": True}
    return {"ok": False, "differing": differing, "largest": largest, "nan": nans}


# The two kernels


def of_two_kernels(
    dtype: torch.dtype, n: int, causal: bool, device: torch.device
) -> dict[str, Any]:
    """The row of a comparison of forward_gluon.py with forward.py, at D 128."""
    gluon = forward.gluon_module()
    if gluon is None:
        return {"skipped": "this Triton has no Gluon"}
    result: dict[str, Any] = {}

    def check() -> None:
        call = two_kernels_call(dtype, n, causal, device)
        results = list(gluon.attention_forward_gluon(call))
        result.update(difference([results], [by_triton(call)]))

    return {**outcome(check), **result}


def two_kernels_call(dtype: torch.dtype, n: int, causal: bool, device: torch.device) -> Arguments:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (
        torch.randn(2, heads, n, 128, generator=generator).to(device, dtype)
        for heads in (HEADS[0], HEADS[1], HEADS[1])
    )
    return Arguments(q, k, v, scale=128**-0.5, window_right=0 if causal else -1)


def by_triton(call: Arguments) -> Results:
    """[o, lse] of forward.py, however much work the call is."""
    with mock.patch.object(forward, "gains_by_gluon", lambda problem: False):
        return list(forward.attention_forward(call)[:2])


# A sequence, and where it stands


def sequences(
    lengths: tuple[int, ...], dtype: torch.dtype, dim: int, device: torch.device
) -> list[list[Tensor]]:
    """Draws q, k, v, do (H, n, D) and dlse (H, n) for each length."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    heads, kv_heads = HEADS
    shapes = [(h, n, dim) for n in lengths for h in (heads, kv_heads, kv_heads, heads)]
    drawn = iter([draw(*shape).to(dtype) for shape in shapes])
    return [[*(next(drawn) for _ in range(4)), draw(heads, n)] for n in lengths]


def evaluate(
    call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor,
    **keywords: Any,
) -> Results:  # fmt: skip
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = call(q, k, v, enable_gqa=True, return_lse=True, **keywords)
    return [o.detach(), lse.detach(), *torch.autograd.grad([o, lse], [q, k, v], [do, dlse])]


def alone(member: list[Tensor], keywords: dict[str, Any]) -> Results:
    return [x[0] for x in evaluate(fused_attention, *(x[None] for x in member), **keywords)]


def padded(members: list[list[Tensor]], i: int, left: bool, fill: float) -> Tensor:
    """Part i of all sequences, (B, H, n, ...), filled up on one side."""
    n = max(member[i].shape[1] for member in members) + EXTRA
    first = members[0][i]
    batch = first.new_full((len(members), first.shape[0], n, *first.shape[2:]), fill)
    for row, member in zip(batch, members, strict=True):
        row[:, rows_of(member, n, left)] = member[i]
    return batch


def rows_of(member: list[Tensor], n: int, left: bool) -> slice:
    length = member[0].shape[1]
    return slice(n - length, n) if left else slice(0, length)


def of_members(results: Results, members: list[list[Tensor]], left: bool) -> list[Results]:
    n = results[0].shape[2]
    return [
        [x[at, :, rows_of(member, n, left)] for x in results] for at, member in enumerate(members)
    ]


def with_lengths(members: list[list[Tensor]], keywords: dict[str, Any]) -> list[Results]:
    batch = [padded(members, i, False, torch.nan) for i in range(5)]
    lengths = torch.tensor([member[0].shape[1] for member in members], device=batch[0].device)
    known = {"q_lengths": lengths, "kv_lengths": lengths}
    return of_members(evaluate(fused_attention, *batch, **known, **keywords), members, False)


def behind_a_mask(
    left: bool, members: list[list[Tensor]], keywords: dict[str, Any]
) -> list[Results]:
    """[o, lse, dq] of each sequence; dk and dv also sum over the queries in the padding."""
    fills = (0.5, torch.nan, torch.nan, 0.0, 0.0)
    batch = [padded(members, i, left, fill) for i, fill in enumerate(fills)]
    n = batch[0].shape[2]
    mask = torch.zeros(len(members), 1, 1, n, dtype=torch.bool, device=batch[0].device)
    for row, member in zip(mask, members, strict=True):
        row[..., rows_of(member, n, left)] = True
    results = evaluate(fused_attention, *batch, attn_mask=mask, **keywords)[:3]
    return of_members(results, members, left)


def packed(members: list[list[Tensor]], keywords: dict[str, Any]) -> list[Results]:
    lengths = [member[0].shape[1] for member in members]
    *qkvd, dlse = (torch.cat([member[i] for member in members], 1) for i in range(5))
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(dlse.device)
    more = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    results = evaluate(
        fused_attention_varlen, *(x.transpose(0, 1).contiguous() for x in qkvd), dlse,
        cu_seqlens_q=starts, **more, **keywords,
    )  # fmt: skip
    results = [x if x.dim() == 2 else x.transpose(0, 1) for x in results]
    parts = zip(*(x.split(lengths, 1) for x in results), strict=True)
    return [list(part) for part in parts]


FORMS: dict[str, Callable[..., list[Results]]] = {
    "lengths": with_lengths,
    "mask right": functools.partial(behind_a_mask, False),
    "mask left": functools.partial(behind_a_mask, True),
    "packed": packed,
}


# Calls compiled ahead of time


def calls_to_record(device: torch.device) -> Iterator[Callable[[], Any]]:
    """Yields the calls of this stage at its own sizes: some are routed by their amount of work."""
    for causal in (False, True):
        for n in SIZES[:2]:
            for dtype in (torch.bfloat16, torch.float16):
                call = two_kernels_call(dtype, n, causal, device)
                yield functools.partial(by_triton, call)
                if (gluon := forward.gluon_module()) is not None:
                    yield functools.partial(gluon.attention_forward_gluon, call)
    for dtype, dim, causal in KINDS:
        members = sequences(LENGTHS, getattr(torch, dtype), dim, device)
        keywords = {"backend": "triton", "is_causal": causal}
        for member in members:
            yield functools.partial(alone, member, keywords)
        for form in FORMS.values():
            yield functools.partial(as_on_device, form, members, keywords)


def as_on_device(form: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a form as on a device: no mask is read, and so none is dropped for being a range."""
    with mock.patch.object(visibility, "concrete", lambda x: False):
        return form(*arguments)
