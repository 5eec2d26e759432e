"""Work on tokens one by one, in pieces whose memory serves again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The widest tensor of BERT base, 3,072 features in fp32, takes 24 MiB of so many tokens: what the C
# library hands out above 32 MiB are fresh pages every time, which cost as much as a product.
TOKENS = 2048


def in_pieces(work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """work(*inputs), where work treats each token by itself; by pieces on the CPU in inference.

    inputs: each (..., features), alike but for the features. Gradients need every intermediate
    anyway, a compiler fuses them, and CUDA keeps its memory: there it is one call.
    """
    tokens = inputs[0].shape[:-1]
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or inputs[0].device.type != "cpu"
        or tokens.numel() <= TOKENS
    ):
        return work(*inputs)
    rows = [x.reshape(-1, x.shape[-1]).split(TOKENS) for x in inputs]
    done = 0
    result = None
    for piece in zip(*rows, strict=True):
        out = work(*piece)
        if result is None:
            result = out.new_empty(tokens.numel(), out.shape[-1])
        result[done : done + len(out)] = out
        done += len(out)
    assert result is not None
    return result.view(*tokens, -1)
