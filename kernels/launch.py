"""Launches of a kernel for a call: the arguments that all kernels share, and the grid."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

from . import relaunch
from .configs import TileConfig, block_d
from .parameters import (
    Form,
    InputStrides,
    MaskStrides,
    Strides,
    inputs_type,
)
from .terms import dropout_bits, factors


class Facts(NamedTuple):
    """The properties of a tensor that a launch depends on, besides its address and device."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class KernelLayout:
    """The part of a launch that calls of the same shapes, strides, types and numbers share.

    call has the fields of backends.call.Arguments with Facts in place of tensors, scale >= 0.
    others: more tensors that share the alignment of q, k and v. natural: NATURAL of Form whatever
    the type. arguments: the keywords that all kernels take, less the tensors. plans: the launches
    that were made.
    """

    def __init__(
        self,
        call: Any,
        others: tuple[Facts, ...],
        natural: bool,
        capability: tuple[int, int],
        precision: str,
    ) -> None:
        self.plans: relaunch.Plans = {}
        self.inputs = inputs_type(call.__class__)
        q, k, v, mask = call.q, call.k, call.v, call.mask
        self.packed = call.cu_seqlens_q is not None
        self.num_seqs = call.cu_seqlens_q.shape[0] - 1 if self.packed else 0
        self.batch = 1 if self.packed else q.shape[0]
        rows = 0 if self.packed else 2
        self.seqlen_q, self.seqlen_k = q.shape[rows], k.shape[rows]
        self.num_heads, self.num_kv_heads = q.shape[1], k.shape[1]
        self.head_dim, self.value_dim = q.shape[-1], v.shape[-1]
        self.widest_dim = max(self.head_dim, self.value_dim)
        self.lse_shape: tuple[int, ...] = (self.num_heads, self.seqlen_q)
        if not self.packed:
            self.lse_shape = (self.batch, *self.lse_shape)
        window_left, window_right = call.window_left, call.window_right
        windowed = window_left >= 0 or window_right >= 0
        self.anchored = (call.bottom_right and windowed) or (
            call.kv_start is not None and (windowed or self.seqlen_q == self.seqlen_k)
        )
        # Without kv_start the first query of a sequence is its first row.
        self.starts_late = call.kv_start is not None
        self.anchors_queries = self.anchored and self.starts_late
        widest = self.seqlen_q + self.seqlen_k
        per_sequence = call.slopes is not None and call.slopes.shape[0] > 1
        self.form = self.form_of(call, others, natural, capability, precision)
        self.factors = factors(call, self.form.NATURAL)
        self.arguments: dict[str, Any] = dict(
            strides=InputStrides(
                self.strides(q), self.strides(k), self.strides(v), mask_strides(mask)
            ),
            num_seqs=self.num_seqs,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            window_left=min(window_left, widest) if window_left >= 0 else None,
            window_right=min(window_right, widest) if window_right >= 0 else None,
            stride_slopes=self.num_heads if per_sequence else 0,
            relative_far=None if call.relative is None else call.relative.shape[1] // 2,
            global_prefix=min(call.global_prefix, self.seqlen_k) or None,
            dropout_bits=dropout_bits(call),
            factors=self.factors,
            form=self.form,
            enable_fp_fusion=False,  # kernels write each fma out
        )
        # Outputs are contiguous.
        self.o_shape = (*q.shape[:-1], self.value_dim)
        self.o_strides = self.strides(contiguous(q._replace(shape=self.o_shape)))
        self.dq_strides, self.dk_strides, self.dv_strides = (
            self.strides(contiguous(x)) for x in (q, k, v)
        )
        self.do_strides = self.strides(others[0]) if others else None
        kind = "plain" if window_left < 0 and call.lo is None else "window"
        if self.form.MASK == "pairs" or (self.form.MASK == "keys" and kind == "plain"):
            kind = self.form.MASK
        if not call.is_plain():
            kind = "terms"
        if self.value_dim != self.head_dim:
            kind = "values_pairs" if kind in ("pairs", "terms") else "values"
        # The arguments of tile_config after the table.
        self.config_key = (capability, self.widest_dim, q.dtype, kind)

    def form_of(
        self,
        call: Any,
        others: tuple[Facts, ...],
        natural: bool,
        capability: tuple[int, int],
        precision: str,
    ) -> Form:
        """Returns the Form of the call of this layout."""
        q, k, v, mask = call.q, call.k, call.v, call.mask
        vector = 16 // q.dtype.itemsize
        aligned = [self.head_dim, self.value_dim]
        for x in (q, k, v, *others):
            aligned += row_strides(x, self.packed)
        exact = q.dtype == torch.float32
        windowed = call.window_left >= 0 or call.window_right >= 0
        distant = call.slopes is not None or call.relative is not None
        is_bias = mask is not None and mask.dtype != torch.bool
        kind = mask_kind(mask, one_head=self.num_heads == self.num_kv_heads)
        # A loop for large scores beside that over pairs would spill: 24 bytes on 8.0, 64 on 10.0.
        wide_pairs = kind == "pairs" and self.widest_dim > 128
        return Form(
            MASK=kind,
            IS_BIAS=is_bias,
            TERMS=call.has_added_terms(),
            EXACT=exact,
            NATURAL=natural or exact or is_bias or call.has_added_terms() or wide_pairs,
            GROUP=self.num_heads // max(self.num_kv_heads, 1),
            IS_PACKED=self.packed,
            # only what is counted from the diagonal depends on its place
            BOTTOM_RIGHT=call.bottom_right and (windowed or call.global_prefix > 0 or distant),
            UNIT=16 if call.seed is not None and call.kv_start is not None else None,
            GUARDED=capability[0] != 9,
            ALIGN=vector if all(s % vector == 0 for s in aligned) else 1,
            PRECISION=precision if exact else "ieee",
            HEAD_DIM=self.head_dim,
            VALUE_DIM=self.value_dim,
            BLOCK_D=block_d(self.head_dim),
            BLOCK_V=block_d(self.value_dim),
        )

    def strides(self, x: Facts) -> Strides:
        """Returns Strides of a tensor in the layout of q; a row stride of the model is constant.

        With a constant the addresses of a tile are one register and constants. A row stride that
        depends on the batch, as in (N, B, H, D), is none: each batch size would compile anew.
        """
        b, h, n = row_strides(x, self.packed)
        dim = x.shape[-1]
        widest_row = 3 * max(self.num_heads, self.num_kv_heads) * self.widest_dim
        return Strides(b, h, constant(n) if n <= widest_row and n % dim == 0 else n)

    def num_query_tiles(self, block: int) -> int:
        """Returns tiles over the queries of a head, one more if the first can start before them."""
        return self.num_tiles(self.seqlen_q, block) + self.anchors_queries

    def num_key_tiles(self, block: int) -> int:
        """Returns tiles over the keys of a head, one more if they start at a kv_start, to cover the
        rows before it.
        """
        return self.num_tiles(self.seqlen_k, block) + self.starts_late

    def num_tiles(self, length: int, block: int) -> int:
        """Returns tiles of one head: of a dense length, or slots for sequences of a packed one."""
        return length // block + self.num_seqs + 1 if self.packed else -(-length // block)


# Shapes of packed batches rarely come back, so layouts are soon forgotten.
@lru_cache(maxsize=256)
def layout(
    kind: Callable[..., Any],
    tensors: tuple[tuple[Any, ...] | None, ...],
    numbers: tuple[Any, ...],
    others: tuple[tuple[Any, ...], ...],
    natural: bool,
    device: torch.device,
    capability: tuple[int, int],
    precision: str,
) -> KernelLayout:
    """Returns a KernelLayout. kind: type of the record of a call. tensors, others: fields of Facts.

    device: of all tensors; a KernelLayout keeps the launches of one device.
    """
    known = (x if x is None else Facts(*x) for x in tensors)
    call = kind(*known, *numbers)
    return KernelLayout(call, tuple(Facts(*x) for x in others), natural, capability, precision)


class KernelProblem:
    """An attention call, a record with the fields of backends.call.Arguments, and its layout.

    others, natural: as in KernelLayout. A negative scale is turned into a negative q.
    """

    def __init__(
        self, call: Any, others: tuple[torch.Tensor, ...] = (), natural: bool = False
    ) -> None:
        self.negative = call.scale < 0
        if self.negative:
            call = call._replace(q=-call.q, scale=-call.scale)
        count = len(inputs_type(call.__class__)._fields)
        self.call, self.tensors, self.device = call, call[:count], call.q.device
        # Tuples are hashed and compared in C; only a new layout makes Facts of them.
        tensors = [x if x is None else (x.shape, x.stride(), x.dtype) for x in self.tensors]
        self.layout = layout(
            call.__class__,
            tuple(tensors),
            call[count:],
            tuple([(x.shape, x.stride(), x.dtype) for x in others]),
            natural,
            self.device,
            device_capability(self.device),
            fp32_precision() if call.q.dtype == torch.float32 else "ieee",
        )

    def empty_output(self) -> torch.Tensor:
        """Returns an unwritten contiguous tensor for o, (B, H, Nq, Dv) or (Tq, H, Dv)."""
        q, layout = self.call.q, self.layout
        if layout.value_dim == layout.head_dim:
            return empty_like(q)
        return q.new_empty(layout.o_shape)

    def empty_lse(self) -> torch.Tensor:
        """Returns an unwritten fp32 tensor, (B, H, Nq) or (H, Tq)."""
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
        """Launches `programs` on axis 0; by default one a tile, for all heads and batch entries."""
        layout = self.layout
        if programs is None:
            programs = num_tiles * num_heads * layout.batch
        with on_device(self.device):
            key = (id(kernel), id(config), num_tiles, num_heads, programs)
            for plan in layout.plans.get(key, ()):
                if plan.again(self.tensors, arguments):
                    return
            inputs = layout.inputs(*self.tensors)
            fixed = dict(
                num_tiles=num_tiles,
                num_heads=num_heads,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **layout.arguments,
            )
            made = relaunch.launch(kernel, programs, inputs, arguments, fixed, config)
            relaunch.keep(layout.plans, key, made)

    def on_device(self) -> AbstractContextManager:
        """Returns a context in which Triton launches on the device of q."""
        return on_device(self.device)


def row_strides(x: Facts, packed: bool) -> tuple[int, ...]:
    """Returns the (batch, head, row) strides of a dense (B, H, N, D) or packed (T, H, D) tensor."""
    return (0, x.strides[1], x.strides[0]) if packed else x.strides[:3]


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Returns an unwritten contiguous tensor, in a quarter of the time that torch.empty takes."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def contiguous(x: Facts) -> Facts:
    """Returns the Facts of a contiguous tensor of that shape."""
    strides, size = [], 1
    for n in reversed(x.shape):
        strides.append(size)
        size *= max(n, 1)
    return x._replace(strides=tuple(reversed(strides)))


def mask_kind(mask: Facts | None, one_head: bool) -> str | None:
    """Returns MASK of Form. one_head: a key head has one query head."""
    if mask is None:
        return None
    strides = mask_strides(mask)
    return "keys" if strides.m == 0 and (one_head or strides.h == 0) else "pairs"


def mask_strides(mask: Facts | None) -> MaskStrides:
    """Returns the strides of a mask, 0 where it broadcasts and where there is none."""
    if mask is None:
        return MaskStrides(0, 0, 0, 0)
    sides = zip(mask.shape, mask.strides, strict=True)
    return MaskStrides(*(0 if n == 1 else stride for n, stride in sides))


@lru_cache
def constant(n: int) -> tl.constexpr:
    """Returns n as a constexpr, always the same object."""
    return tl.constexpr(n)


def fp32_precision() -> str:
    """Returns how the tensor cores take fp32; the 16-bit types have no choice."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on_device(device: torch.device) -> AbstractContextManager:
    """Returns a context in which this device is the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return SAME_DEVICE
    return torch.cuda.device(device)


SAME_DEVICE = nullcontext()


@lru_cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability; that of Hopper for the CPU tensors of the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
