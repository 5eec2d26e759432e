"""The records that a kernel gets from the host and hands on whole.

Every supported Triton takes NamedTuples as arguments of a kernel. Triton compiles a kernel anew
where an integer in a tuple becomes 1 or a multiple of 16; so the integers that vary from call to
call are parameters of their own, NOT_SPECIALIZED. No function of Triton 3.6 returns None, in a
record either; so the kernels themselves build each record that can hold None.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

LOG2E = 1.4426950408889634
SMALLEST_SCALE = 2.0**-126  # not 0: a hidden score is -inf, and 0 * -inf is NaN
LARGEST = torch.finfo(torch.float32).max
DROPOUT_BITS = 24

NOT_SPECIALIZED = [
    "num_tiles", "num_heads", "num_seqs", "seqlen_q", "seqlen_k", "window_left", "window_right",
    "stride_slopes", "relative_far", "global_prefix", "dropout_bits",
]  # fmt: skip


@lru_cache
def inputs_type(kind: Any) -> Any:
    """Returns a NamedTuple type of the tensors of a call of type `kind`.

    Tensors are the fields without a default or with None, and `kind` begins with them.
    """
    names = [name for name in kind._fields if kind._field_defaults.get(name) is None]
    return NamedTuple("Inputs", [(name, Any) for name in names])


class Strides(NamedTuple):
    """Elements from a batch entry, a head and a row to the next; in a row elements are adjacent."""

    b: Any
    h: Any
    n: Any


class MaskStrides(NamedTuple):
    """Elements from a batch entry, a head, a query and a key to the next; 0 where it broadcasts."""

    b: Any
    h: Any
    m: Any
    n: Any


class InputStrides(NamedTuple):
    """Strides of the inputs that have more than one dimension."""

    q: Strides
    k: Strides
    v: Strides
    mask: MaskStrides


class Sizes(NamedTuple):
    """Counts of a call. num_tiles: of one head. seqlen_q, seqlen_k: all rows of a packed layout."""

    num_tiles: Any
    num_heads: Any
    num_seqs: Any
    seqlen_q: Any
    seqlen_k: Any


class Factors(NamedTuple):
    """The floats of a call, None for a step that it leaves out.

    scale: of dq and dk. qk_scale, natural_scale: what takes q.k, or its softcapped value, to a
    score in the kernel's units, and to a natural one. cap_scale: what takes q.k to the argument of
    tanh. kept_scale: the weight of a pair that dropout keeps.
    """

    scale: float
    qk_scale: float
    natural_scale: float
    cap_scale: float | None
    kept_scale: float | None


class Form(NamedTuple):
    """The constexprs of the kernels of a call.

    MASK: None, "keys" (every query that meets a key sees the same) or "pairs". TERMS: something is
    added to scores besides a mask. EXACT: fp32. NATURAL: scores are natural until the maximum is
    taken off, else base 2. GROUP: query heads of a key head. UNIT: None, or what first_tile
    rounds to. GUARDED: see _accumulate_dkdv. ALIGN: elements that all
    addresses and strides are multiples of.
    """

    MASK: str | None
    IS_BIAS: bool
    TERMS: bool
    EXACT: bool
    NATURAL: bool
    GROUP: int
    IS_PACKED: bool
    BOTTOM_RIGHT: bool
    UNIT: int | None
    GUARDED: bool
    ALIGN: int
    PRECISION: str
    HEAD_DIM: int
    BLOCK_D: int


def dropout_bits(call: Any) -> int | None:
    """Returns the probability of dropout in 2^-24; None without dropout."""
    return None if call.seed is None else round(call.dropout_p * (1 << DROPOUT_BITS))


def factors(call: Any, natural: bool) -> Factors:
    """Returns the Factors of a call with scale >= 0. natural: NATURAL of Form."""
    factor = call.softcap or call.scale
    natural_scale = max(factor, SMALLEST_SCALE)
    bits = dropout_bits(call)
    kept = None if bits is None else 1 - bits / (1 << DROPOUT_BITS)
    return Factors(
        scale=call.scale,
        qk_scale=natural_scale if natural else max(factor * LOG2E, SMALLEST_SCALE),
        natural_scale=natural_scale,
        cap_scale=min(call.scale / call.softcap, LARGEST) if call.softcap else None,
        kept_scale=None if kept is None else 1 / kept if kept > 0 else 0.0,
    )
