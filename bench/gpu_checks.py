"""Stages of gpu.py that check odd shapes, equal bits, capture in graphs, and no waiting."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from gpu_jobs import in_processes
from gpu_numerics import Case, Problem
from gpu_speed import AGREE, relative
from torch import Tensor

from clinattn import fused_attention, fused_attention_varlen

if TYPE_CHECKING:
    from gpu import Run

Call = Callable[..., Tensor]
REPEATS = 250
LENGTHS, DRYRUN_LENGTHS = (577, 0, 200, 1), (12, 1)
MODEL_WIDTH = 768  # heads times head_dim of a base encoder: part of the strides, so of the kernels


def inputs(
    device: torch.device | str, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[Tensor]:
    """q, k, v and do."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def gradients(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, **keywords: Any
) -> list[Tensor]:
    """[o, dq, dk, dv]"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = call(q, k, v, **keywords)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


# In processes of their own, where compiling goes on side by side


def shapes_that_broke_others(run: Run) -> None:
    """Each of these gave NaN or silent nonsense in another library."""
    checked("gpu_checks:shape_job", list(SHAPES), run)


def race(run: Run) -> None:
    """250 repeats give the same bits, forward and backward."""
    types = [(dtype, dim) for dtype in ("bfloat16", "float32") for dim in (64, 128)]
    kinds = [name for name, *_ in calls("cpu", (1,), 16)]
    jobs = [(*x, kind) for x in (types if not run.dryrun else [("bfloat16", 16)]) for kind in kinds]
    checked("gpu_checks:race_job", jobs, run)


def checked(function: str, jobs: list[Any], run: Run) -> None:
    for rows, left in in_processes(function, jobs, run, run.left() - 10 - 30 * run.coming):
        for row in rows:
            job = row.pop("job")
            run.row(case=job if isinstance(job, str) else " ".join(map(str, job)), **row)
        if left:
            run.row(skipped=f"{left} for want of time")


def outcome(check: Callable[[], Any]) -> dict[str, Any]:
    """ok, or what the check raised."""
    try:
        check()
        return {"ok": True}
    except Exception as error:
        return {"ok": False, "error": str(error)[:300], "trace": traceback.format_exc()[-1500:]}


def shape_job(name: str, device: str) -> dict[str, Any]:
    return outcome(lambda: SHAPES[name](device))


def race_job(job: tuple[str, int, str], device: str) -> dict[str, Any]:
    dtype, dim, kind = job
    lengths, repeats = (LENGTHS, REPEATS) if device != "cpu" else (DRYRUN_LENGTHS, 1)
    problems = {name: x for name, *x in calls(device, lengths, dim, getattr(torch, dtype))}
    call, qkvd, keywords = problems[kind]
    try:
        expected = gradients(call, *qkvd, **keywords)
        differing = 0
        for _ in range(repeats):
            again = gradients(call, *qkvd, **keywords)
            differing += not all(map(torch.equal, again, expected))
        return {"repeats": repeats, "differing": differing, "ok": differing == 0}
    except Exception as error:
        return {"ok": False, "error": str(error)[:300]}


# Shapes


def compare(q: Tensor, k: Tensor, v: Tensor, do: Tensor, **keywords: Any) -> None:
    """Triton against the reference in fp64: NaN or another number is meant to be found here."""
    actual = gradients(fused_attention, q, k, v, do, backend="triton", **keywords)
    wide = {x: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y
            for x, y in keywords.items()}  # fmt: skip
    exact = [x.double() for x in (q, k, v, do)]
    truth = gradients(fused_attention, *exact, backend="reference", **wide)
    for name, x, y in zip(("o", "dq", "dk", "dv"), actual, truth, strict=True):
        far = relative(x.double(), y)
        assert far < AGREE, f"{name}: relative error {far:.3g}"


def very_negative_lse(device: str) -> None:
    """lse below -90 with a ragged last tile: 2^(0 - lse) overflows where padding is read as 0."""
    for n in (192, 193) if device != "cpu" else (33,):
        q, k, v, do = inputs(device, 1, 2, n, 64)
        mask = torch.full((1, 1, n, n), -200.0, device=device, dtype=q.dtype)
        compare(q, k, v, do, attn_mask=mask)
        compare(q, k, v, do, attn_mask=mask[:, :, :1])


def misaligned(device: str) -> None:
    """Storage offsets of one element, rows that are no multiple of 16 bytes, expanded do."""
    n = 130 if device != "cpu" else 20
    whole = [x.flatten() for x in inputs(device, 1, 2, n + 1, 65)]
    strides = (2 * n * 65, n * 65, 65, 1)
    q, k, v, do = (x.as_strided((1, 2, n, 64), strides, 1) for x in whole)
    compare(q, k, v, do)
    compare(*(x.contiguous() for x in (q, k, v)), do)
    compare(q, k, v, torch.ones((), device=q.device, dtype=q.dtype).expand(q.shape))


def many_heads(device: str) -> None:
    """More (batch, head) pairs than the second and third axes of a grid can count.

    Three keys: autograd through softmax has half the error in dk of gradients from (o, lse), so
    one evaluation of plain fp32 maths is too narrow a yardstick; Problem has several.
    """
    case = Case("many-heads", batch=70_000 if device != "cpu" else 7, heads=1, nq=3)
    problem = Problem(case, torch.float32, device)
    problem.check(problem.run("triton"))


def offsets_beyond_32_bits(device: str) -> None:
    """Keys 2^31 elements apart."""
    stride = 2**31 + 8 if device != "cpu" else 264
    q, k, v, do = inputs(device, 1, 1, 2, 64)
    memory = torch.empty(stride + 64, device=device, dtype=q.dtype)
    compare(q, memory.as_strided(k.shape, (1, 1, stride, 1)).copy_(k), v, do)


SHAPES: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (very_negative_lse, misaligned, many_heads, offsets_beyond_32_bits)
}


# The calls of training


def calls(
    device: torch.device | str,
    sequences: tuple[int, ...],
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Iterator[tuple[str, Call, list[Tensor], dict[str, Any]]]:
    """(name, call, [q, k, v, do], keywords): dense, windowed, masked and packed."""
    n, heads = sequences[0], MODEL_WIDTH // dim if dim > 16 else 1
    lengths = torch.tensor(sequences)
    keys = (torch.arange(n) < lengths[:, None].clamp(min=1)).to(device)[:, None, None]
    bias = torch.linspace(-2, 2, n * n, device=device, dtype=dtype).view(1, 1, n, n)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device)
    known = {"q_lengths": lengths.to(device), "kv_lengths": lengths.to(device)}
    dense: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"is_causal": True},
        "window": {"window": 100},
        "key mask": {"attn_mask": keys},
        "key mask window": {"attn_mask": keys, "window": 100},
        "bias": {"attn_mask": bias},
        "lengths": known,
        "lengths window": {**known, "window": 100},
    }
    x = inputs(device, len(sequences), heads, n, dim, dtype=dtype, seed=seed)
    for name, keywords in dense.items():
        yield name, fused_attention, x, {"backend": "triton", **keywords}
    bounds = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": n, "max_seqlen_k": n}
    packed = {"packed": {}, "packed causal": {"is_causal": True}, "packed window": {"window": 100}}
    x = inputs(device, sum(sequences), heads, dim, dtype=dtype, seed=seed)
    for name, keywords in packed.items():
        yield name, fused_attention_varlen, x, {"backend": "triton", **bounds, **keywords}


def graph_capture(run: Run) -> None:
    """After one warm-up call a CUDA graph takes forward and backward, and replays them on new data.

    In the dry run a replay is another call.
    """
    lengths, dim = (LENGTHS, 64) if not run.dryrun else (DRYRUN_LENGTHS, 16)
    problems = [calls(run.device, lengths, dim, seed=seed) for seed in (0, 1)]
    for (name, call, qkvd, keywords), (_, _, fresh, _) in zip(*problems, strict=True):

        def forward(call: Call = call, x: list[Tensor] = qkvd, keywords: Any = keywords) -> Any:
            with torch.no_grad():
                return [call(*x[:3], **keywords)]

        def both(call: Call = call, x: list[Tensor] = qkvd, keywords: Any = keywords) -> Any:
            return gradients(call, *x, **keywords)

        for way, function in (("forward", forward), ("forward and backward", both)):
            kept = [x.clone() for x in qkvd]
            result = outcome(lambda: same_bits(function, qkvd, fresh, run.device))  # noqa: B023
            run.row(case=f"{name}, {way}", **result)
            for x, y in zip(qkvd, kept, strict=True):
                x.copy_(y)


def same_bits(
    function: Callable[[], list[Tensor]],
    static: list[Tensor],
    fresh: list[Tensor],
    device: torch.device,
) -> None:
    """The replay of a captured call gives what the call gives, on data that came after capture."""
    replay = captured(function, device)
    for x, y in zip(static, fresh, strict=True):
        x.copy_(y)
    replayed = [x.clone() for x in replay()]
    for actual, expected in zip(replayed, function(), strict=True):
        assert torch.equal(actual, expected), f"{(actual != expected).sum()} values differ"


def captured(
    function: Callable[[], list[Tensor]], device: torch.device
) -> Callable[[], list[Tensor]]:
    """What replays function(), after one call of it on the stream that capturing wants."""
    if device.type != "cuda":
        function()
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


def no_host_sync(run: Run) -> None:
    """Neither pass waits for the device; torch raises where one of its operations would."""
    lengths, dim = (LENGTHS, 64) if not run.dryrun else (DRYRUN_LENGTHS, 16)
    for name, call, qkvd, keywords in calls(run.device, lengths, dim):
        gradients(call, *qkvd, **keywords)

        def check(call: Call = call, qkvd: list[Tensor] = qkvd, keywords: Any = keywords) -> None:
            with synchronization_forbidden(run.device):
                gradients(call, *qkvd, **keywords)

        run.row(case=name, **outcome(check))


@contextmanager
def synchronization_forbidden(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
