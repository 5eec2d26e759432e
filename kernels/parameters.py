"""The records that a kernel gets from the host and hands on whole.

Every supported Triton takes NamedTuples as arguments of a kernel. Triton compiles a kernel anew
where an integer in a tuple becomes 1 or a multiple of 16; so the integers that vary from call to
call are parameters of their own, NOT_SPECIALIZED. No function of Triton 3.6 returns None, in a
record either; so the kernels themselves build each record that can hold None.
"""

from functools import lru_cache
from typing import Any, NamedTuple

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


class Form(NamedTuple):
    """The constexprs of the kernels of a call.

    MASK: None, "keys" (every query that meets a key sees the same) or "pairs". TERMS: something is
    added to scores besides a mask. EXACT: fp32. NATURAL: scores are natural until the maximum is
    taken off, else base 2. GROUP: query heads of a key head. UNIT: None, or what first_tile
    rounds to. GUARDED: see _accumulate_dkdv. ALIGN: elements that all addresses and strides are
    multiples of. HEAD_DIM, VALUE_DIM: of q and k, and of v and o, in tiles of BLOCK_D and BLOCK_V
    columns.
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
    VALUE_DIM: int
    BLOCK_D: int
    BLOCK_V: int
