"""Stages of run.py that time dense attention against torch's own.

Every provider of a shape runs in the same process, in turns. Results and gradients of the providers
are compared before they are timed.
"""

from __future__ import annotations

import functools

import torch
import torch._functorch.config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from clinattn import fused_attention
from gpu.dense_shapes import Shape, shapes
from gpu.providers import SDPA_BACKENDS, Call, Provider, bf16_inputs, compare, pinned_sdpa
from gpu.rows import Run
from gpu.timing import release_memory


def dense(run: Run) -> None:
    """Forward and backward TFLOP/s of ours and each SDPA backend, bf16."""
    for shape in shapes(run.dryrun):
        if not run.enough_time(5, f"speed from {shape} on"):
            return
        compare_dense(shape, sdpa_calls(shape, run), run)


def flex(run: Run) -> None:
    """Ours against compiled flex_attention, at one length: each shape takes seconds to compile."""
    n = 8192 if not run.dryrun else 24
    for shape in shapes(run.dryrun):
        if shape.n == n:
            if not run.enough_time(45, f"flex from {shape} on"):
                return
            compare_dense(shape, {"flex": flex_call(shape, run)}, run)


def compare_dense(shape: Shape, peers: dict[str, Call], run: Run) -> None:
    *qkv, do = bf16_inputs(run, shape.batch, shape.heads, shape.n, shape.dim)
    window = 128 if shape.mask == "window128" else None
    keywords = {"is_causal": shape.mask == "causal", "window": window}
    providers = {
        f"clinattn-{backend}": Provider(
            functools.partial(fused_attention, backend=backend, **keywords),
            tuple(qkv),
            do,
            backend=backend,
        )
        for backend in run.backends
    }
    for name, call in peers.items():
        providers[name] = Provider(call, tuple(qkv), do, compiled=name == "flex")
    compare(providers, shape.flops(), run, **vars(shape))
    release_memory(run.device)


def sdpa_calls(shape: Shape, run: Run) -> dict[str, Call]:
    band = None
    if shape.mask == "window128":
        if shape.n > 8192:
            return {}
        index = torch.arange(shape.n, device=run.device)
        band = (index[:, None] - index).abs() <= 128
    causal = shape.mask == "causal"
    return {
        name: functools.partial(pinned_sdpa, backend, band, causal)
        for name, backend in SDPA_BACKENDS.items()
    }


def flex_call(shape: Shape, run: Run) -> Call:
    rules = {
        "causal": lambda b, h, i, j: i >= j,
        "window128": lambda b, h, i, j: (i - j).abs() <= 128,
    }
    block_mask = None
    if shape.mask in rules:
        block_mask = create_block_mask(
            rules[shape.mask], None, None, shape.n, shape.n, device=str(run.device)
        )
    if run.dryrun:
        return functools.partial(flex_attention, block_mask=block_mask)
    torch.compiler.reset()  # after eight shapes torch would stop compiling
    torch._functorch.config.donated_buffer = False  # backward runs many times on one graph
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=block_mask)
