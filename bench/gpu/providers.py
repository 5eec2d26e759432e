"""Ours and torch's own attention on the same inputs: compared first, then timed in turns.

A row is the median and quartiles of the rounds, of a provider and a pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.rows import Run
from gpu.timing import AGREE, Function, in_turns, relative, release_memory

SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Call = Callable[..., Tensor]


class Provider(NamedTuple):
    """call(*tensors) -> o with gradient do. visible: the rows of such a tensor that count.

    backend: which of ours it is. compiled: torch.compile would compile it once more to run without
    gradients.
    """

    call: Call
    tensors: tuple[Tensor, ...]
    do: Tensor
    visible: Callable[[Tensor], Tensor] = lambda x: x
    backend: str | None = None
    compiled: bool = False


def compare(providers: dict[str, Provider], forward_flops: float, run: Run, **fields: Any) -> None:
    """Rows of every provider that works and agrees with the first, one of ours, in both passes."""
    ways: dict[str, dict[str, Function]] = {"forward": {}, "backward": {}}
    labels = {name: {"provider": name, "backend": x.backend} for name, x in providers.items()}
    first: list[Tensor] | None = None
    agreeing, differing = [], []
    for name, provider in providers.items():
        call, tensors, do, visible, mine, compiled = provider
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        try:
            o = call(*leaves)
            grads = torch.autograd.grad(o, leaves, do, retain_graph=True)
            results = [visible(x.detach()).float() for x in (o, *grads)]
        except Exception as error:
            text = str(error).strip()[:200]
            why = {"ok": False, "error": text} if mine else {"not_supported": text}
            run.row(**labels[name], **fields, **why)
            release_memory(run.device)
            continue
        if first is None:
            first = results
        else:
            distance = max(relative(x, y) for x, y in zip(results, first, strict=True))
            agrees = distance < AGREE
            if not mine:
                (agreeing if agrees else differing).append(name)
            if not agrees:
                wrong = {"ok": False} if mine else {}
                run.row(**labels[name], **fields, differs=distance, **wrong)
                continue
        inference = functools.partial(call if compiled else without_gradients(call), *leaves)
        ways["forward"][name] = inference
        ways["backward"][name] = functools.partial(
            torch.autograd.grad, o, leaves, do, retain_graph=True
        )
    if differing and not agreeing:
        run.row(**fields, ok=False, error=f"ours agrees with none of {', '.join(differing)}")
    for direction, functions in ways.items():
        flops = forward_flops * (1 if direction == "forward" else 2.5)
        failed: dict[str, str] = {}
        for name, result in in_turns(functions, run, failed=failed).items():
            tflops = flops / result["ms"] / 1e9
            run.row(direction=direction, **labels[name], **fields, **result, tflops=tflops)
        for name, error in failed.items():
            why = {"ok": False, "error": error} if providers[name].backend else {"failed": error}
            run.row(direction=direction, **labels[name], **fields, **why)


def bf16_inputs(run: Run, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, device=run.device).bfloat16() for _ in range(4)]


def pinned_sdpa(backend: SDPBackend, mask: Tensor | None, causal: bool, *qkv: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask, is_causal=causal)


def without_gradients(call: Call) -> Call:
    def run(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return call(*tensors)

    return run
