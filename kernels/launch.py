"""What every kernel is launched with: pointers, strides, sizes, and the choices compiled in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

from . import relaunch
from .configs import TileConfig, block_d

LOG2E = 1.4426950408889634
SMALLEST_SCALE = 2.0**-126  # scores are -inf where hidden, and 0 * -inf is not
LARGEST = torch.finfo(torch.float32).max
DROPOUT_BITS = 24

# Integers that vary from call to call: another value is no reason to compile anew.
NOT_SPECIALIZED = [
    "num_tiles", "num_heads", "num_seqs", "seqlen_q", "seqlen_k", "window_left", "window_right",
    "stride_slopes", "relative_far", "global_prefix", "dropout_bits",
]  # fmt: skip


# Keywords of the tensors that an Arguments begins with, in its order.
POINTERS = (
    "q_ptr", "k_ptr", "v_ptr", "mask_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "q_lengths_ptr",
    "kv_start_ptr", "kv_end_ptr", "lo_ptr", "hi_ptr", "times_ptr", "decay_ptr", "slopes_ptr",
    "relative_ptr", "seed_ptr",
)  # fmt: skip
COUNT = len(POINTERS)


class Facts(NamedTuple):
    """What a launch depends on of a tensor, besides where it lies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Layout:
    """All that calls of the same shapes, strides, types and numbers have in common.

    call has the fields of backends.call.Arguments with Facts in place of tensors, scale >= 0.
    others: more tensors that share the alignment of q, k and v. arguments: the keywords that all
    kernels take, less the pointers. plans: the launches that were made.
    """

    def __init__(
        self, call: Any, others: tuple[Facts, ...], capability: tuple[int, int], precision: str
    ) -> None:
        self.plans: relaunch.Plans = {}
        q, k, v, scale = call.q, call.k, call.v, call.scale
        self.packed = call.cu_seqlens_q is not None
        self.num_seqs = call.cu_seqlens_q.shape[0] - 1 if self.packed else 0
        self.batch = 1 if self.packed else q.shape[0]
        rows = 0 if self.packed else 2
        self.seqlen_q, self.seqlen_k = q.shape[rows], k.shape[rows]
        self.num_heads, self.num_kv_heads, self.head_dim = q.shape[1], k.shape[1], q.shape[-1]
        self.lse_shape: tuple[int, ...] = (self.num_heads, self.seqlen_q)
        if not self.packed:
            self.lse_shape = (self.batch, *self.lse_shape)
        vector = 16 // q.dtype.itemsize
        exact = q.dtype == torch.float32
        aligned = (*map(self.strides, (q, k, v, *others)), (self.head_dim,))
        window_left, window_right = call.window_left, call.window_right
        windowed = window_left >= 0 or window_right >= 0
        distant = call.slopes is not None or call.relative is not None
        self.anchored = (call.bottom_right and windowed) or (
            call.kv_start is not None and (windowed or self.seqlen_q == self.seqlen_k)
        )
        # Without kv_start the first query of a sequence is that of its rows.
        self.anchors_queries = self.anchored and call.kv_start is not None
        widest = self.seqlen_q + self.seqlen_k
        factor = call.softcap or scale  # of what the kernels then take for q.k
        biased = call.mask is not None and call.mask.dtype != torch.bool
        masked = mask_arguments(call.mask, one_head=self.num_heads == self.num_kv_heads)
        # A loop for large scores beside the one of pairs would spill: 24 bytes on 8.0, 64 on 10.0.
        wide_pairs = masked["MASK"] == "pairs" and self.head_dim > 128
        # Whether scores are natural until the maximum is taken off, see score.exponential
        self.natural = exact or biased or distant or call.decay is not None or wide_pairs
        self.natural_scale = max(factor, SMALLEST_SCALE)
        per_sequence = call.slopes is not None and call.slopes.shape[0] > 1
        self.arguments: dict[str, Any] = dict(
            num_seqs=self.num_seqs,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            stride_slopes=self.num_heads if per_sequence else 0,
            window_left=min(window_left, widest) if window_left >= 0 else None,
            window_right=min(window_right, widest) if window_right >= 0 else None,
            qk_scale=self.natural_scale if self.natural else max(factor * LOG2E, SMALLEST_SCALE),
            cap_scale=min(scale / call.softcap, LARGEST) if call.softcap else None,
            relative_far=None if call.relative is None else call.relative.shape[1] // 2,
            global_prefix=min(call.global_prefix, self.seqlen_k) or None,
            **dropout_arguments(None if call.seed is None else call.dropout_p),
            EXACT=exact,
            NATURAL=self.natural,
            GROUP=self.num_heads // max(self.num_kv_heads, 1),
            IS_PACKED=self.packed,
            # what is counted from the diagonal depends on where it is
            BOTTOM_RIGHT=call.bottom_right and (windowed or call.global_prefix > 0 or distant),
            ALIGN=vector if all(s % vector == 0 for group in aligned for s in group) else 1,
            PRECISION=precision if exact else "ieee",
            HEAD_DIM=self.head_dim,
            BLOCK_D=block_d(self.head_dim),
            enable_fp_fusion=False,  # the kernels say where they want an fma
        )
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.arguments |= self.stride_arguments(name, x)
        self.arguments |= masked
        # Outputs are contiguous: those like q and those like k.
        self.o_strides = self.stride_arguments("o", contiguous(q))
        self.dk_strides = self.stride_arguments("dk", contiguous(k))
        self.do_strides = self.stride_arguments("do", others[0]) if others else {}
        kind = "plain" if window_left < 0 and call.lo is None else "window"
        if masked["MASK"] == "pairs" or (masked["MASK"] == "keys" and kind == "plain"):
            kind = masked["MASK"]
        terms = (call.decay, call.slopes, call.relative, call.seed)
        if call.softcap or any(x is not None for x in terms):
            kind = "terms"
        # What tile_config goes by.
        self.config_key = (capability, self.head_dim, q.dtype, kind)

    def strides(self, x: Facts) -> tuple[int, ...]:
        """(batch, head, row) strides of a tensor in the layout of q."""
        return (0, x.strides[1], x.strides[0]) if self.packed else x.strides[:3]

    def stride_arguments(self, name: str, x: Facts) -> dict[str, Any]:
        """stride_<name>b, h and n. A row stride that belongs to the model is compiled in.

        The addresses of a tile are then one register and constants. One that depends on the batch,
        as in (N, B, H, D), is not: every batch size would compile anew.
        """
        b, h, n = self.strides(x)
        widest_row = 3 * max(self.num_heads, self.num_kv_heads) * self.head_dim
        row = constant(n) if n <= widest_row and n % self.head_dim == 0 else n
        return {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}n": row}

    def num_query_tiles(self, block: int) -> int:
        """Tiles over the queries of a head, and one more where the first can start before them."""
        return self.num_tiles(self.seqlen_q, block) + self.anchors_queries

    def num_tiles(self, length: int, block: int) -> int:
        """Tiles of one head: of a dense length, or slots for the sequences of a packed one."""
        return length // block + self.num_seqs + 1 if self.packed else -(-length // block)


# Shapes of packed batches rarely come back; their layouts are soon forgotten.
@lru_cache(maxsize=256)
def layout(
    kind: Callable[..., Any],
    tensors: tuple[tuple[Any, ...] | None, ...],
    numbers: tuple[Any, ...],
    others: tuple[tuple[Any, ...], ...],
    capability: tuple[int, int],
    precision: str,
) -> Layout:
    """The layout of a call of this kind of record, of which `tensors` and `others` are Facts."""
    known = (x if x is None else Facts(*x) for x in tensors)
    return Layout(kind(*known, *numbers), tuple(Facts(*x) for x in others), capability, precision)


class Problem:
    """One attention call, with the fields of backends.call.Arguments, as the kernels see it.

    others: as in Layout. A negative scale is turned into a negative q.
    """

    def __init__(self, call: Any, others: tuple[torch.Tensor, ...] = ()) -> None:
        self.negative = call.scale < 0
        if self.negative:
            call = call._replace(q=-call.q, scale=-call.scale)
        self.call, self.tensors, self.device = call, call[:COUNT], call.q.device
        # A tuple is hashed and compared in C; Facts are made of it where the layout is new.
        tensors = [
            x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in self.tensors
        ]
        self.layout = layout(
            call.__class__,
            tuple(tensors),
            call[COUNT:],
            tuple([(x.shape, x.stride(), x.dtype, x.device) for x in others]),
            device_capability(self.device),
            fp32_precision() if call.q.dtype == torch.float32 else "ieee",
        )

    def empty_lse(self) -> torch.Tensor:
        """fp32, (B, H, Nq) or (H, Tq)."""
        return self.call.q.new_empty(self.layout.lse_shape, dtype=torch.float32)

    def launch(
        self,
        kernel: Any,
        config: TileConfig,
        num_tiles: int,
        num_heads: int,
        programs: int | None = None,
        **arguments: Any,
    ) -> None:
        """All programs on axis 0; by default one for each tile of each head of each batch entry."""
        layout = self.layout
        if programs is None:
            programs = num_tiles * num_heads * layout.batch
        with on_device(self.device):
            key = (id(kernel), id(config), num_tiles, num_heads, programs)
            for plan in layout.plans.get(key, ()):
                if plan.again(self.tensors, arguments):
                    return
            known = dict(zip(POINTERS, self.tensors, strict=True))
            fixed = dict(
                num_tiles=num_tiles,
                num_heads=num_heads,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **layout.arguments,
            )
            made = relaunch.launch(kernel, programs, known, arguments, fixed, config)
            relaunch.keep(layout.plans, key, made)

    def on_device(self) -> AbstractContextManager:
        """Triton launches on the current device, which need not be that of q."""
        return on_device(self.device)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Unwritten and contiguous, in a quarter of the time of torch.empty with shape and type."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def contiguous(x: Facts) -> Facts:
    """The facts of a contiguous tensor of that shape."""
    strides, size = [], 1
    for n in reversed(x.shape):
        strides.append(size)
        size *= max(n, 1)
    return x._replace(strides=tuple(reversed(strides)))


def mask_arguments(mask: Facts | None, one_head: bool) -> dict[str, Any]:
    """How a mask is read: MASK is None, "keys" (every query that meets a key sees the same) or
    "pairs". one_head: a key head has one query head.
    """
    if mask is None:
        strides, kind, is_bias = [0, 0, 0, 0], None, False
    else:
        strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True)]
        kind = "keys" if strides[2] == 0 and (one_head or strides[1] == 0) else "pairs"
        is_bias = mask.dtype != torch.bool
    names = ("stride_mb", "stride_mh", "stride_mm", "stride_mn")
    return dict(zip(names, strides, strict=True)) | {"MASK": kind, "IS_BIAS": is_bias}


def dropout_arguments(dropout_p: float | None) -> dict[str, Any]:
    """The probability in 2^-24, and the factor of what is kept; None without dropout."""
    if dropout_p is None:
        return {"dropout_bits": None, "kept_scale": None}
    bits = round(dropout_p * (1 << DROPOUT_BITS))
    kept = 1 - bits / (1 << DROPOUT_BITS)
    return {"dropout_bits": bits, "kept_scale": 1 / kept if kept > 0 else 0.0}


@lru_cache
def constant(n: int) -> tl.constexpr:
    return tl.constexpr(n)


def fp32_precision() -> str:
    """How the tensor cores take fp32; the 16-bit types have no choice."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(device: torch.device) -> AbstractContextManager:
    """Within this context the current device, on which Triton launches, is that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return SAME_DEVICE
    return torch.cuda.device(device)


SAME_DEVICE = nullcontext()


@lru_cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of Hopper for the CPU tensors of the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
