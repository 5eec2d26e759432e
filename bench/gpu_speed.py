"""Stages of gpu.py that measure: time against peers, launch overhead, memory, tile configurations.

Every provider of a shape runs in the same process, in turns; a row is the median and quartiles of
the rounds. Each result is compared with ours before it is timed.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from clinattn import fused_attention, fused_attention_varlen
from clinattn.kernels import backward, configs, forward
from clinattn.workloads import sample_lengths

if TYPE_CHECKING:
    from gpu import Run

SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
TOKENS, WIDTH = 16_384, 2048  # batch times length, and heads times head_dim, of the dense shapes
ROUNDS = 7


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
        side = min(128, self.n - 1) if self.mask == "window128" else self.n - 1
        return self.n * (2 * side + 1) - side * (side + 1)

    def flops(self, direction: str) -> int:
        """4D for each visible pair forward, 10D backward."""
        each = 4 if direction == "forward" else 10
        return each * self.dim * self.batch * self.heads * self.pairs()


Call = Callable[..., Tensor]


def card_facts(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on and torch does not tell: the driver, and the card as found."""
    if device.type != "cuda":
        return {"dryrun": True}
    query = "driver_version,power.limit,clocks.max.sm,memory.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    values = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    names = ("driver", "power_limit", "max_sm_clock", "gpu_memory")
    properties = torch.cuda.get_device_properties(device)
    return {
        **dict(zip(names, (x.strip() for x in values.split(",")), strict=False)),
        "sms": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
    }


# Timing


def seconds(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
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


def in_turns(functions: dict[str, Callable[[], Any]], run: Run) -> dict[str, dict[str, float]]:
    """Median and quartiles, in ms, of each function over rounds that interleave them."""
    repeats = {}
    for name, function in functions.items():
        function()
        once = seconds(function, 2 if not run.dryrun else 1, run.device)
        repeats[name] = max(1, min(100, round(0.015 / max(once, 1e-6)))) if not run.dryrun else 1
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS if not run.dryrun else 2):
        for name, function in functions.items():
            rounds[name].append(1e3 * seconds(function, repeats[name], run.device))
    results = {}
    for name, times in rounds.items():
        low, median, high = statistics.quantiles(times, n=4)
        results[name] = {"ms": median, "ms_low": low, "ms_high": high}
    return results


def providers(
    calls: dict[str, tuple[Call, tuple[Tensor, ...]]], do: Tensor, run: Run, **fields: Any
) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """(direction, what to time) of the calls that work; the first one checks the others."""
    ways: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "backward": {}}
    expected: Tensor | None = None
    for name, (call, tensors) in calls.items():
        try:
            leaves = tuple(x.detach().requires_grad_() for x in tensors)
            with torch.no_grad():
                o = call(*leaves)
            if expected is None:
                expected = o
            elif o.shape == expected.shape and (o - expected).abs().max() > 0.05:
                run.row(provider=name, **fields, ok=False, error="differs from ours")
                continue
            o = call(*leaves)
            gradient = do if do.shape == o.shape else torch.ones_like(o)
            torch.autograd.grad(o, leaves, gradient, retain_graph=True)
        except Exception as error:
            run.row(provider=name, **fields, not_supported=str(error).strip()[:100])
            continue
        ways["forward"][name] = functools.partial(no_grad, call, leaves)
        ways["backward"][name] = functools.partial(
            torch.autograd.grad, o, leaves, gradient, retain_graph=True
        )
    yield from ways.items()


def no_grad(call: Call, tensors: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return call(*tensors)


# Dense shapes


def dense(run: Run) -> None:
    """D 64 and 128, N 512 to 16k, full, causal and a window of 128, bf16."""
    for shape in shapes(run.dryrun):
        if not run.enough_time(60, f"speed from {shape} on"):
            return
        q, k, v, do = bf16_inputs(run, shape.batch, shape.heads, shape.n, shape.dim)
        fields = vars(shape)
        calls = {name: (call, (q, k, v)) for name, call in dense_calls(shape, run).items()}
        for direction, ways in providers(calls, do, run, **fields):
            for name, result in in_turns(ways, run).items():
                tflops = shape.flops(direction) / result["ms"] / 1e9
                run.row(direction=direction, provider=name, **fields, **result, tflops=tflops)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def shapes(dryrun: bool) -> Iterator[Shape]:
    if dryrun:
        yield from (Shape(1, 1, 24, 16, mask) for mask in ("full", "causal", "window128"))
        return
    for n in (4096, 512, 1024, 2048, 8192, 16_384):
        for dim in (64, 128):
            for mask in ("full", "causal", "window128"):
                yield Shape(max(1, TOKENS // n), WIDTH // dim, n, dim, mask)


def bf16_inputs(run: Run, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, device=run.device).bfloat16() for _ in range(4)]


def dense_calls(shape: Shape, run: Run) -> dict[str, Call]:
    keywords: dict[str, Any] = {"is_causal": shape.mask == "causal"}
    if shape.mask == "window128":
        keywords["window"] = 128
    calls: dict[str, Call] = {
        "clinattn": functools.partial(fused_attention, backend="triton", **keywords)
    }
    band = None
    if shape.mask == "window128" and shape.n <= 8192:
        index = torch.arange(shape.n, device=run.device)
        band = (index[:, None] - index).abs() <= 128
    if shape.mask != "window128" or band is not None:
        for name, backend in SDPA_BACKENDS.items():
            if name != "sdpa-math" or (shape.n <= 1024 and not run.dryrun):
                calls[name] = functools.partial(pinned_sdpa, backend, band, shape.mask == "causal")
    if shape.n == 4096:  # one length: torch.compile takes many seconds for each shape
        calls["flex"] = compiled_flex(shape, run)
    return calls


def pinned_sdpa(backend: SDPBackend, mask: Tensor | None, causal: bool, *qkv: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask, is_causal=causal)


def compiled_flex(shape: Shape, run: Run) -> Call:
    rules = {
        "causal": lambda b, h, i, j: i >= j,
        "window128": lambda b, h, i, j: (i - j).abs() <= 128,
    }
    block_mask = None
    if shape.mask in rules:
        block_mask = create_block_mask(
            rules[shape.mask], None, None, shape.n, shape.n, device=str(run.device)
        )
    return functools.partial(torch.compile(flex_attention), block_mask=block_mask)


# Clinical lengths


def packed(run: Run) -> None:
    """Length profiles packed, against the same sequences padded behind a key mask."""
    profiles = ("ehr_population", "note_discharge", "ehr_icu")
    for profile in profiles if not run.dryrun else profiles[:1]:
        for dim in (64, 128) if not run.dryrun else (16,):
            if not run.enough_time(30, f"packed from {profile} on"):
                return
            count, longest = (64, 8192) if not run.dryrun else (3, 9)
            lengths = torch.as_tensor(sample_lengths(profile, count, longest))
            one_profile(profile, dim, lengths, run)


def one_profile(profile: str, dim: int, lengths: Tensor, run: Run) -> None:
    heads = 768 // dim if not run.dryrun else 1
    total, longest = int(lengths.sum()), int(lengths.max())
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(run.device)
    q, k, v, do = bf16_inputs(run, total, heads, dim)
    rows = torch.arange(longest) < lengths[:, None]

    def pad(x: Tensor) -> Tensor:
        out = x.new_zeros(*rows.shape, heads, dim)
        out[rows.to(run.device)] = x
        return out.transpose(1, 2)

    mask = rows.to(run.device)[:, None, None]
    known = lengths.to(run.device)
    tensors = tuple(map(pad, (q, k, v)))
    calls: dict[str, tuple[Call, tuple[Tensor, ...]]] = {
        "clinattn-packed": (
            functools.partial(
                fused_attention_varlen,
                cu_seqlens_q=cu_seqlens,
                max_seqlen_q=longest,
                backend="triton",
            ),
            (q, k, v),
        ),
        "clinattn-lengths": (
            functools.partial(
                fused_attention, q_lengths=known, kv_lengths=known, backend="triton"
            ),
            tensors,
        ),
        "clinattn-mask": (
            functools.partial(fused_attention, attn_mask=mask, backend="triton"),
            tensors,
        ),
    }
    for name, backend in SDPA_BACKENDS.items():
        if name not in ("sdpa-math", "sdpa-flash"):  # flash takes no mask
            calls[name] = (functools.partial(pinned_sdpa, backend, mask, False), tensors)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        pass
    else:
        bounds = (cu_seqlens, cu_seqlens, longest, longest)
        calls["torch-varlen"] = (lambda q, k, v: varlen_attn(q, k, v, *bounds), (q, k, v))
    pairs = int((lengths**2).sum())
    fields = dict(profile=profile, sequences=len(lengths), tokens=total, longest=longest, dim=dim)
    for direction, ways in providers(calls, do, run, **fields):
        for name, result in in_turns(ways, run).items():
            each = (4 if direction == "forward" else 10) * dim * heads
            tflops = each * pairs / result["ms"] / 1e9
            run.row(direction=direction, provider=name, **fields, **result, tflops=tflops)


# What does not grow with the work


def launch_overhead(run: Run) -> None:
    """Host microseconds of a call on a tiny problem, where the device keeps up."""
    q, k, v, do = bf16_inputs(run, 1, 1, 16, 64)
    plain = (q, k, v, *[None] * 6, 0.125, -1, -1, False, 16, 16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both(call: Call) -> None:
        torch.autograd.grad(call(*leaves), leaves, do)

    ours = functools.partial(fused_attention, backend="triton")
    for name, function in {
        "kernel launcher": lambda: forward.attention_forward(*plain),
        "fused_attention": lambda: no_grad(ours, (q, k, v)),
        "fused_attention with gradients": lambda: both(ours),
        "sdpa": lambda: no_grad(F.scaled_dot_product_attention, (q, k, v)),
        "sdpa with gradients": lambda: both(F.scaled_dot_product_attention),
    }.items():
        repeats = 300 if not run.dryrun else 1
        times = []
        for _ in range(3):
            synchronize(run.device)
            began = time.perf_counter()
            for _ in range(repeats):
                function()
            times.append(1e6 * (time.perf_counter() - began) / repeats)
            synchronize(run.device)
        run.row(call=name, microseconds=min(times))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run) -> None:
    """Bytes above the inputs, forward and backward: O(N), with nothing N by N."""
    for n in (4096, 16_384) if not run.dryrun else (16,):
        q, k, v, do = bf16_inputs(run, 1, 16, n, 64)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        before = 0
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        torch.autograd.grad(fused_attention(*leaves, backend="triton"), leaves, do)
        if run.device.type == "cuda":
            synchronize(run.device)
            peak = torch.cuda.max_memory_allocated() - before
            outputs = 4 * q.numel() * 2 + 3 * n * 16 * 4  # o dq dk dv, and lse delta shift
            run.row(n=n, peak_bytes=peak, outputs_bytes=outputs, ok=peak < 1.5 * outputs)


# Which rows the configuration tables should have


def tile_sweep(run: Run) -> None:
    """Time other tiles than the shipped ones, pass by pass, while time is left."""
    for dim in (64, 128) if not run.dryrun else (16,):
        for mask in ("full", "causal"):
            for table, module in (("forward", forward), ("dkdv", backward), ("dq", backward)):
                if not run.enough_time(40, f"tiles from {table} {dim} {mask} on"):
                    return
                sweep(table, module, dim, mask, run)


CANDIDATES = {
    "forward": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2)],
    "dkdv": [(64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 3)],
    "dq": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
}


def sweep(table: str, module: Any, dim: int, mask: str, run: Run) -> None:
    n = 4096 if not run.dryrun else 20
    shape = Shape(4 if not run.dryrun else 1, WIDTH // dim if not run.dryrun else 1, n, dim, mask)
    q, k, v, do = bf16_inputs(run, shape.batch, shape.heads, n, dim)
    rest = (*[None] * 6, dim**-0.5, -1, 0 if mask == "causal" else -1, False, n, n)
    o, lse = forward.attention_forward(q, k, v, *rest)
    shipped = module.tile_config
    tiles = CANDIDATES[table] if not run.dryrun else [(16, 16, 4, 1)]
    for tile in (None, *tiles):
        config = configs.TileConfig(*tile) if tile else None

        def chosen(name: str, *key: Any, config: Any = config) -> configs.TileConfig:
            return config if config and name == table else shipped(name, *key)

        module.tile_config = chosen
        try:
            if table == "forward":
                ways = {"": lambda: forward.attention_forward(q, k, v, *rest)}
            else:
                ways = {"": lambda: backward.attention_backward(do, None, o, lse, q, k, v, *rest)}
            result = in_turns(ways, run)[""]
            run.row(table=table, tile=tile or "shipped", dim=dim, mask=mask, **result)
        except Exception as error:
            run.row(table=table, tile=tile, dim=dim, mask=mask, not_supported=str(error)[:100])
        finally:
            module.tile_config = shipped
