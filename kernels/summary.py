"""Summaries of attention weights: sums by key, or numbers by query, in O(N) memory. No atomics."""

from typing import Any

import torch

from .configs import tile_config
from .launch import KernelProblem
from .summary_columns import RECEIVED, summary_columns_kernel
from .summary_rows import ENTROPY, TOPK, summary_rows_kernel


def attention_summary(
    call: Any, inputs: Any, reduce: int, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (values, places) of the weights of attention_forward(call), as an operator asks.

    call, inputs: with the fields of Arguments and Summary of backends.call, which also says what
    each number `reduce` stands for, and the shapes. places is empty for all but TOPK.
    """
    reads_values = RECEIVED.value < reduce < ENTROPY.value
    if not reads_values:  # v may be of another width, which only costs
        call = call._replace(v=call.k)
    problem = KernelProblem(call, others=(inputs.do,) if reads_values else (), natural=True)
    if reduce < ENTROPY.value:
        return _columns(problem, inputs, reduce), call.q.new_empty(0, dtype=torch.int64)
    return _rows(problem, inputs, reduce, top)


def _columns(problem: KernelProblem, inputs: Any, reduce: int) -> torch.Tensor:
    layout = problem.layout
    products = "one product" if reduce == RECEIVED.value else "two products"
    config = tile_config(products, *layout.config_key)
    sums = inputs.lse.new_empty((*layout.lse_shape[:-1], layout.seqlen_k))
    problem.launch(
        summary_columns_kernel,
        config,
        layout.num_key_tiles(config.block_n),
        layout.num_heads,
        do_ptr=inputs.do,
        lse_ptr=inputs.lse,
        lse_low_ptr=inputs.lse_low,
        weights_ptr=inputs.weights,
        sums_ptr=sums,
        do_strides=layout.do_strides,
        REDUCE=reduce,
        ANCHORED=layout.anchored,
    )
    return sums


def _rows(
    problem: KernelProblem, inputs: Any, reduce: int, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    layout, is_topk = problem.layout, reduce == TOPK.value
    config = tile_config("one product", *layout.config_key)
    shape = (*layout.lse_shape, top) if is_topk else layout.lse_shape
    values = inputs.lse.new_empty(shape)
    places = values.new_empty(shape if is_topk else (0,), dtype=torch.int64)
    problem.launch(
        summary_rows_kernel,
        config,
        layout.num_query_tiles(config.block_m),
        layout.num_heads,
        lse_ptr=inputs.lse,
        lse_low_ptr=inputs.lse_low,
        values_ptr=values,
        places_ptr=places if is_topk else None,
        top=top,
        REDUCE=reduce,
        SLOTS=1 << (top - 1).bit_length() if is_topk else 1,
        ANCHORED=layout.anchors_queries,
    )
    return values, places
