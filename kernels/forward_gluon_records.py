"""The records that the functions of forward_gluon_kernel.py hand on whole."""

from typing import Any, NamedTuple


class Descriptors(NamedTuple):
    """Descriptors of the copy engine for q, k and v."""

    q: Any
    k: Any
    v: Any


class Outputs(NamedTuple):
    """Pointers to o and lse. strides: Strides of o."""

    o_ptr: Any
    lse_ptr: Any
    strides: Any


class GluonSizes(NamedTuple):
    """Counts of a call. num_tiles: of one head. offset: key at which query 0 stands."""

    num_items: Any
    num_tiles: Any
    num_heads: Any
    seqlen_q: Any
    seqlen_k: Any
    offset: Any


class Memory(NamedTuple):
    """Shared memory: tiles of queries and of o, rings of K and V, and the barriers of all.

    A full barrier completes a phase when a tile has arrived, an empty one when all consumers have
    left it. turns: a barrier for each consumer, for its turn to issue products.
    """

    q: Any
    o: Any
    q_full: Any
    q_empty: Any
    k: Any
    v: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    turns: Any


class Done(NamedTuple):
    """Counts of what a consumer has done: tiles of queries, tiles of keys, turns."""

    queries: Any
    keys: Any
    turns: Any


class GluonForm(NamedTuple):
    """The constexprs of forward_kernel: fields of Form and Schedule, ROWS queries a consumer."""

    GROUP: int
    CAUSAL: bool
    PAIRS: bool
    TURNS: bool
    CONSUMERS: int
    ROWS: int
    HEAD_DIM: int
    BLOCK_N: int
    STAGES: int
