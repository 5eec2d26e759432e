"""What every kernel is launched with: pointers, strides, sizes, and the choices compiled in."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl

from .configs import TileConfig, block_d

LOG2E = 1.4426950408889634
SMALLEST_SCALE = 2.0**-126  # scores are -inf where hidden, and 0 * -inf is not


# Integers that vary from call to call: another value is no reason to compile anew.
NOT_SPECIALIZED = [
    "num_tiles", "num_heads", "num_seqs", "seqlen_q", "seqlen_k", "window_left", "window_right",
    "stride_slopes", "relative_far", "global_prefix", "dropout_bits",
]  # fmt: skip
DROPOUT_BITS = 24


class Problem:
    """One attention call as the kernels see it, with the fields of clinattn.arguments.Arguments.

    arguments: the keywords that all kernels take. others: more tensors that share the alignment of
    q, k and v. A negative scale is turned into a negative q.
    """

    def __init__(self, call: Any, others: tuple[torch.Tensor, ...] = ()) -> None:
        q, k, v, scale = call.q, call.k, call.v, call.scale
        self.negative = scale < 0
        if self.negative:
            q, scale = -q, -scale
        self.call, self.q = call, q
        self.packed = call.cu_seqlens_q is not None
        self.num_seqs = call.cu_seqlens_q.shape[0] - 1 if self.packed else 0
        self.batch = 1 if self.packed else q.shape[0]
        rows = 0 if self.packed else 2
        self.seqlen_q, self.seqlen_k = q.shape[rows], k.shape[rows]
        self.num_heads, self.num_kv_heads, self.head_dim = q.shape[1], k.shape[1], q.shape[-1]
        self.capability = device_capability(q.device)
        vector = 16 // q.element_size()
        exact = q.dtype == torch.float32
        aligned = (*map(self.strides, (q, k, v, *others)), (self.head_dim,))
        window_left, window_right = call.window_left, call.window_right
        windowed = window_left >= 0 or window_right >= 0
        distant = call.slopes is not None or call.relative is not None
        self.anchored = (call.bottom_right and windowed) or (
            call.kv_start is not None and (windowed or self.seqlen_q == self.seqlen_k)
        )
        widest = self.seqlen_q + self.seqlen_k
        factor = call.softcap or scale  # of what the kernels then take for q.k
        self.arguments: dict[str, Any] = dict(
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            mask_ptr=call.mask,
            cu_seqlens_q_ptr=call.cu_seqlens_q,
            cu_seqlens_k_ptr=call.cu_seqlens_k,
            q_lengths_ptr=call.q_lengths,
            kv_start_ptr=call.kv_start,
            kv_end_ptr=call.kv_end,
            lo_ptr=call.lo,
            hi_ptr=call.hi,
            times_ptr=call.times,
            decay_ptr=call.decay,
            slopes_ptr=call.slopes,
            relative_ptr=call.relative,
            seed_ptr=call.seed,
            stride_slopes=0 if call.slopes is None or len(call.slopes) == 1 else self.num_heads,
            num_seqs=self.num_seqs,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            window_left=min(window_left, widest) if window_left >= 0 else None,
            window_right=min(window_right, widest) if window_right >= 0 else None,
            qk_scale=max(factor if exact else factor * LOG2E, SMALLEST_SCALE),
            cap_scale=scale / call.softcap if call.softcap else None,
            relative_far=None if call.relative is None else call.relative.shape[1] // 2,
            global_prefix=min(call.global_prefix, self.seqlen_k) or None,
            **dropout_arguments(call),
            EXACT=exact,
            GROUP=self.num_heads // max(self.num_kv_heads, 1),
            IS_PACKED=self.packed,
            # what is counted from the diagonal depends on where it is
            BOTTOM_RIGHT=call.bottom_right and (windowed or call.global_prefix > 0 or distant),
            ALIGN=vector if all(s % vector == 0 for group in aligned for s in group) else 1,
            PRECISION=dot_precision(q.dtype),
            HEAD_DIM=self.head_dim,
            BLOCK_D=block_d(self.head_dim),
            enable_fp_fusion=False,  # the kernels say where they want an fma
        )
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.arguments |= self.stride_arguments(name, x)
        self.arguments |= mask_arguments(call.mask, one_head=self.num_heads == self.num_kv_heads)

    @property
    def config_key(self) -> tuple[tuple[int, int], int, torch.dtype, str]:
        """What tile_config goes by."""
        call = self.call
        kind = "plain" if call.window_left < 0 and call.lo is None else "window"
        by_pair = (call.decay, call.slopes, call.relative, call.seed)
        if self.arguments["MASK"] == "pairs" or call.softcap or any(x is not None for x in by_pair):
            kind = "pairs"
        return self.capability, self.head_dim, self.q.dtype, kind

    def strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        """(batch, head, row) strides of a tensor in the layout of q."""
        if self.packed:
            return 0, x.stride(1), x.stride(0)
        return x.stride(0), x.stride(1), x.stride(2)

    def stride_arguments(self, name: str, x: torch.Tensor) -> dict[str, Any]:
        """stride_<name>b, h and n. A row stride that belongs to the model is compiled in.

        The addresses of a tile are then one register and constants. One that depends on the batch,
        as in (N, B, H, D), is not: every batch size would compile anew.
        """
        b, h, n = self.strides(x)
        widest_row = 3 * max(self.num_heads, self.num_kv_heads) * self.head_dim
        row = constant(n) if n <= widest_row and n % self.head_dim == 0 else n
        return {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}n": row}

    def empty_lse(self) -> torch.Tensor:
        """fp32, (B, H, Nq) or (H, Tq)."""
        rows = (self.num_heads, self.seqlen_q)
        shape = rows if self.packed else (self.batch, *rows)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def num_tiles(self, length: int, block: int) -> int:
        """Tiles of one head: of a dense length, or slots for the sequences of a packed one."""
        return length // block + self.num_seqs + 1 if self.packed else -(-length // block)

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
        if programs is None:
            programs = num_tiles * num_heads * self.batch
        with self.on_device():
            kernel[(programs,)](
                num_tiles=num_tiles,
                num_heads=num_heads,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **arguments,
                **self.arguments,
            )

    def on_device(self) -> AbstractContextManager:
        """Triton launches on the current device, which need not be that of q."""
        device = self.q.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(device)


def mask_arguments(mask: torch.Tensor | None, one_head: bool) -> dict[str, Any]:
    """How a mask is read: MASK is None, "keys" (every query that meets a key sees the same) or
    "pairs". one_head: a key head has one query head.
    """
    if mask is None:
        strides, kind, is_bias = [0, 0, 0, 0], None, False
    else:
        strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
        kind = "keys" if strides[2] == 0 and (one_head or strides[1] == 0) else "pairs"
        is_bias = mask.dtype != torch.bool
    names = ("stride_mb", "stride_mh", "stride_mm", "stride_mn")
    return dict(zip(names, strides, strict=True)) | {"MASK": kind, "IS_BIAS": is_bias}


def dropout_arguments(call: Any) -> dict[str, Any]:
    """The probability in 2^-24, and the factor of what is kept; None without dropout."""
    if call.seed is None:
        return {"dropout_bits": None, "kept_scale": None}
    bits = round(call.dropout_p * (1 << DROPOUT_BITS))
    kept = 1 - bits / (1 << DROPOUT_BITS)
    return {"dropout_bits": bits, "kept_scale": 1 / kept if kept > 0 else 0.0}


@lru_cache
def constant(n: int) -> tl.constexpr:
    return tl.constexpr(n)


def dot_precision(dtype: torch.dtype) -> str:
    """How the tensor cores take fp32; the 16-bit types have no choice."""
    lower = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if lower else "ieee"


@lru_cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of Hopper for the CPU tensors of the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
