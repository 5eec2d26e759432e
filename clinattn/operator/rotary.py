"""Rotary positions at real values: the public function, its checks and its derivative."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clinattn.operator import rotary_op, split  # rotary_op registers torch.ops.clinattn.rotary
from clinattn.operator.autograd import Function, op_is_watched
from clinattn.operator.timeline import difference
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import SERVED_DTYPES, check_backend, check_tensor
from clinattn.operator.words.scalars import as_flag, as_float, as_int, limits

ROTARY = torch.ops.clinattn.rotary.default
POSITION_DTYPES = (torch.float32, torch.float64, torch.int64)
INDICES = 1 << 20  # sequences of integers that start below it count tokens, others are times


def _turn(*args: Any) -> tuple[Tensor, Tensor]:
    """Runs the op, without its 10 us of dispatch where nothing watches it."""
    return ROTARY(*args) if op_is_watched(*args[:3]) else rotary_op.rotary(*args)


class Rotary(Function):
    """The op with its gradient, which is the same turn the other way."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        frequencies: Tensor,
        interleaved: bool,
        inverse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _turn(q, k, positions, frequencies, interleaved, inverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, positions, frequencies, *ctx.scalars = inputs
        ctx.save_for_backward(positions, frequencies)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        interleaved, inverse, backend = ctx.scalars
        # A compiled graph is differentiated once, and takes the op without a Function around it.
        turn = ROTARY if torch.compiler.is_compiling() else Rotary.run
        dq, dk = turn(dq, dk, *ctx.saved_tensors, interleaved, not inverse, backend)
        return dq, dk, None, None, None, None, None


def rotary(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Turns pairs of features of q and k by angles that grow with position, in one pass.

    q: (B, H, N, D); k: (B, Hkv, N, D). Or packed: q (T, H, D), k (T, Hkv, D), in which cu_seqlens,
    int32 (S + 1,), marks the sequences as for fused_attention_varlen; without it they are one.
    positions: (N,) or (B, N), packed (T,), fp32, fp64 or int64, in any unit (tokens, days) and
    order. They have no gradient.
    theta: pair i turns by theta ** (-2 i / rotary_dim) radians for each unit of position.
    rotary_dim: even, 2 to D, default D: the first features turn, the rest passes through.
    interleaved: pairs are (0, 1), (2, 3), ...; else (i, i + rotary_dim / 2).
    backend: "triton", "cpu" or "reference"; None chooses (see clinattn.backends()).

    Floating positions count from the first one of their sequence: that is subtracted in their own
    dtype, so that fp64 times of 5e7 keep steps of 1e-3, and the difference is rounded to fp32, as
    are the angles (fp64 for fp64 q). Attention depends on differences of positions alone. q and k
    of one attention call must have the same origin: turn them in one call, and give padding on the
    left the first position of its sequence. int64 positions of a sequence that starts below 2^20
    are indices and taken as they are: results are those of transformers' apply_rotary_pos_emb, in
    fp32, and fit keys of an earlier call. Larger int64 positions are times, which count from the
    first as floating ones do.

    Returns (q, k) in their dtype, under autocast too; arithmetic is fp32 at least, and a sequence
    has the same bits alone, padded or packed. Follows Su et al., RoFormer (2021). Raises TypeError
    or ValueError for wrong arguments, NotImplementedError for positions that require a gradient,
    RuntimeError where the backend asked for cannot run.
    """
    _check_q_and_k(q, k)
    packed = q.dim() == 3
    shapes: list[tuple[int, ...]] = [(q.shape[0] if packed else q.shape[2],)]
    if not packed:
        shapes.append((q.shape[0], q.shape[2]))
    check_positions(positions, shapes, q.device)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    rotary_dim = _check_rotary_dim(rotary_dim, q.shape[-1])
    theta = check_theta("theta", theta, q.dtype)
    interleaved = as_flag("interleaved", interleaved)
    backend = check_backend(backend)
    steps = steps_of(positions, cu_seqlens if packed else None, q.dtype)
    frequencies = frequencies_of(theta, rotary_dim, q.device, q.dtype)
    return turned(q, k, Angles(steps, frequencies), interleaved, backend)


class Angles(NamedTuple):
    """The angles of tokens as two factors: positions from an origin, and radians of each pair."""

    steps: Tensor
    frequencies: Tensor


def steps_of(positions: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns positions counted from the origin of their sequence, fp32, or fp64 for fp64."""
    return difference(positions, _origin(positions, cu_seqlens), _of_angles(dtype))


def frequencies_of(
    theta: float, rotary_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Returns the radians of each pair for a position of 1: (R / 2,), fp32, or fp64 for fp64."""
    pair = torch.arange(0, rotary_dim, 2, device=device, dtype=_of_angles(dtype))
    return 1.0 / theta ** (pair / rotary_dim)


def _of_angles(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def turned(
    q: Tensor, k: Tensor, angles: Angles, interleaved: bool = False, backend: str = ""
) -> tuple[Tensor, Tensor]:
    """Turns checked q and k by these angles."""
    args = (*angles, interleaved, False, backend)
    if torch.compiler.is_compiling():
        # torch.compile refuses a Function that gets the same tensor twice.
        return Rotary.apply(q.view_as(q), k.view_as(k), *args)
    if (
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # the op alone would drop tangents without a word
    ):  # fmt: skip
        return Rotary.run(q, k, *args)
    return _turn(q, k, *args)


def _origin(positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the position that those of each token's sequence are counted from."""
    begin, tokens = 0, positions.shape[-1]
    if split.active is not None:  # the first token of a sequence may be another process's
        begin, positions = split.active.part(tokens).begin, split.active.gathered(positions, -1)
    if cu_seqlens is None:
        first = positions[..., :1]
    else:
        token = torch.arange(begin, begin + tokens, device=positions.device, dtype=torch.int32)
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
        first = positions[cu_seqlens[sequence].clamp(0, positions.shape[0] - 1)]
    if first.is_floating_point():
        return first
    return first.where((first >= INDICES) | (first <= -INDICES), 0)


def _check_q_and_k(q: Any, k: Any) -> None:
    check_tensor("q", q)
    check_tensor("k", k)
    if q.dtype not in SERVED_DTYPES:
        raise TypeError(f"q: got {q.dtype}, expected one of {', '.join(map(str, SERVED_DTYPES))}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: got {k.dtype}, expected that of q, {q.dtype}")
    if k.device != q.device:
        raise ValueError(f"k: got device {k.device}, expected that of q, {q.device}")
    if q.dim() not in (3, 4):
        raise ValueError(
            f"q: got shape {tuple(q.shape)}, expected (batch, heads, tokens, head_dim) or "
            "(total_tokens, heads, head_dim)"
        )
    if k.dim() != q.dim() or (*k.shape[:1], *k.shape[2:]) != (*q.shape[:1], *q.shape[2:]):
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, expected that of q but for the heads, {tuple(q.shape)}"
        )


def check_positions(
    positions: Any, shapes: Iterable[tuple[int, ...]], device: torch.device
) -> None:
    """Checks that positions have one of these shapes and a served dtype, and no gradient."""
    check_tensor("positions", positions)
    if positions.dtype not in POSITION_DTYPES:
        served = ", ".join(map(str, POSITION_DTYPES))
        raise TypeError(f"positions: got {positions.dtype}, expected one of {served}")
    if positions.device != device:
        raise ValueError(f"positions: got device {positions.device}, expected that of q, {device}")
    if tuple(positions.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"positions: got shape {tuple(positions.shape)}, expected {expected}")
    if positions.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "positions: no backend computes their gradient; pass positions.detach()"
        )


def check_theta(name: str, theta: Any, dtype: torch.dtype) -> float:
    """Returns a base whose powers down to theta ** -1 fit the precision of the angles."""
    theta, angles = as_float(name, theta), limits(dtype)
    if not angles.tiny <= theta <= angles.max:
        raise ValueError(
            f"{name}: got {theta}, expected a positive number from {angles.tiny:.4g} to "
            f"{angles.max:.4g}"
        )
    return theta


def _check_rotary_dim(rotary_dim: Any, head_dim: int) -> int:
    rotary_dim = head_dim if rotary_dim is None else as_int("rotary_dim", rotary_dim)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(
            f"rotary_dim: got {rotary_dim}, expected an even number from 2 to head_dim, {head_dim}"
        )
    return rotary_dim


def _check_cu_seqlens(cu_seqlens: Any, q: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if q.dim() == 4:
        raise ValueError("cu_seqlens: got one for q (B, H, N, D), expected packed q (T, H, D)")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: got {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens: got device {cu_seqlens.device}, expected that of q, {q.device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (number of sequences + 1,)"
        )
    if concrete(cu_seqlens):
        ends = cu_seqlens.tolist()
        tokens, of = q.shape[0], "q"
        if split.active is not None:
            tokens, of = split.active.part(tokens).total, "all processes"
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > tokens:
            raise ValueError(
                f"cu_seqlens: got {ends}, expected to start at 0, never decrease and end at most "
                f"at the {tokens} tokens of {of}"
            )
