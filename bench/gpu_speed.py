"""Stages of gpu.py that time dense attention against torch's own, and the timing itself.

Every provider of a shape runs in the same process, in turns; a row is the median and quartiles of
the rounds. Results and gradients of the providers are compared before they are timed.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from clinattn import fused_attention

if TYPE_CHECKING:
    from gpu import Run

SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOKENS, WIDTH = 16_384, 2048  # batch times length, and heads times head_dim, of the dense shapes
ROUNDS = 7
AGREE = 0.02  # ||x - ours|| / ||ours|| of bf16 results is a few thousandths

Call = Callable[..., Tensor]
Function = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    n: int
    dim: int
    mask: str = "full"  # or causal, window128

    def pairs(self) -> int:
        if self.mask == "causal":
            return self.n * (self.n + 1) // 2
        return pairs_in_window(self.n, 128 if self.mask == "window128" else None)

    def flops(self) -> int:
        """4D for each visible pair forward; backward takes 10D."""
        return 4 * self.dim * self.batch * self.heads * self.pairs()


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


def pairs_in_window(n: int, window: int | None) -> int:
    side = n - 1 if window is None else min(window, n - 1)
    return n * (2 * side + 1) - side * (side + 1)


# Timing


def seconds(function: Function, repeats: int, device: torch.device) -> float:
    """Time of one of `repeats` calls in a row, by CUDA events where there are any."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - began) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def in_turns(
    functions: dict[str, Function],
    run: Run,
    rounds: int = ROUNDS,
    failed: dict[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """Median and quartiles, in ms, of each function over rounds that interleave them.

    failed: takes the error of a function that raises, out of memory for instance, while the others
    go on; by default the error is raised.
    """
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in functions}

    def measure(name: str, function: Function) -> None:
        if name not in repeats:
            function()
            once = seconds(function, 2, run.device) if not run.dryrun else 1.0
            repeats[name] = max(1, min(100, round(0.015 / max(once, 1e-6))))
        else:
            times[name].append(1e3 * seconds(function, repeats[name], run.device))

    for _ in range(1 + (rounds if not run.dryrun else 2)):
        for name, function in functions.items():
            if failed is None:
                measure(name, function)
            elif name not in failed:
                try:
                    measure(name, function)
                except Exception as error:
                    failed[name] = str(error).strip()[:200]
                    release_memory(run.device)
    results = {}
    for name, values in times.items():
        if name not in (failed or ()):
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            results[name] = {"ms": median, "ms_low": low, "ms_high": high}
    return results


def release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


def relative(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm().clamp(min=1e-30)).item()


def without_gradients(call: Call) -> Call:
    def run(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return call(*tensors)

    return run


# Dense shapes


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


def shapes(dryrun: bool) -> Iterator[Shape]:
    masks = ("full", "causal", "window128")
    if dryrun:
        yield from (Shape(1, 1, 24, 16, mask) for mask in masks)
        return
    for n in (8192, 4096, 1024, 16_384, 512, 2048):
        for dim in (64, 128):
            for mask in masks:
                yield Shape(max(1, TOKENS // n), WIDTH // dim, n, dim, mask)


def bf16_inputs(run: Run, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, device=run.device).bfloat16() for _ in range(4)]


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


def pinned_sdpa(backend: SDPBackend, mask: Tensor | None, causal: bool, *qkv: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask, is_causal=causal)


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
