"""Stages of gpu.py that ask whether the results are right, and always the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clinattn import fused_attention, fused_attention_varlen

if TYPE_CHECKING:
    from gpu import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import CASES, Case  # noqa: E402
from support import Problem, assert_close, dtype_id  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bf16  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORKERS = 10  # processes: compiling, at a second or two a kernel, takes most of the time

# Tails of a tile and of torch's own kernels, for the head dims of clinical encoders.
TAILS = [
    Case(f"tail{r}-dim{d}-{kind}", heads=4, kv_heads=2, nq=256 + r, nk=384 + r, dim=d, **keywords)
    for r in (1, 63, 64, 65, 127)
    for d in (64, 128)
    for kind, keywords in {
        "full": {},
        "causal": {"causal": True},
        "mask": {"mask": "right:b11k"},
        "window": {"window": 70},
    }.items()
]
LARGE = [
    *(Case(f"dim{d}-long", nq=700, dim=d) for d in (32, 64, 72, 96, 128, 160, 256)),
    Case("packed-large", heads=4, kv_heads=2, nq=(1000, 0, 3, 517), dim=64, causal=True),
    Case("packed-large-window", nq=(130, 900, 64), dim=128, window=100),
    Case("bias-large", nq=500, dim=64, mask="float:1hqk"),
]


def numerics(run: Run) -> None:
    """The table of tests/cases.py and larger problems, each dtype, against fp64 on the device."""
    jobs = [(case.id, dtype_id(dtype)) for dtype in DTYPES for case in all_cases(run.dryrun)]
    workers = 1 if run.dryrun else WORKERS
    with ThreadPoolExecutor(workers) as pool:
        shards = [jobs[i::workers] for i in range(workers)]
        for rows in pool.map(lambda shard: in_a_process(shard, run), shards):
            for row in rows:
                if not row["ok"]:
                    run.row(**row)
            run.row(passed=sum(row["ok"] for row in rows), of=len(rows))


def all_cases(dryrun: bool) -> list[Case]:
    if dryrun:
        return [case for case in CASES if case.id in ("one-query", "causal", "packed-tail")]
    return [*CASES, *TAILS, *LARGE]


def in_a_process(jobs: list[tuple[str, str]], run: Run) -> list[dict[str, Any]]:
    """Check these cases in a process of their own: a crash or a hang costs no other case."""
    with tempfile.NamedTemporaryFile("r+", suffix=".jsonl") as out:
        command = [sys.executable, __file__, json.dumps(jobs), out.name, str(run.device)]
        try:
            child = subprocess.run(
                command, timeout=max(run.left() - 200, 60), capture_output=True, text=True
            )
            reason = (child.stderr or "").strip()[-2000:]
        except subprocess.TimeoutExpired:
            reason = "ran out of time"
        rows = [json.loads(line) for line in out.read().splitlines()]
    if len(rows) < len(jobs):  # the case after the last row took the process down
        case, dtype = jobs[len(rows)]
        missing = len(jobs) - len(rows)
        rows.append(dict(case=case, dtype=dtype, ok=False, error=reason, not_run=missing))
    return rows


def check_cases(jobs: list[tuple[str, str]], path: str, device: str) -> None:
    by_id = {case.id: case for case in all_cases(device == "cpu")}
    with open(path, "w") as out:
        for case, dtype in jobs:
            row = {"case": case, "dtype": dtype, "ok": True}
            try:
                problem = Problem(by_id[case], getattr(torch, dtype), device)
                problem.check(problem.run("triton"))
            except Exception as error:
                trace = traceback.format_exc()[-1500:]
                row |= {"ok": False, "error": str(error)[:300], "trace": trace}
            print(json.dumps(row), file=out, flush=True)


def shapes_that_broke_others(run: Run) -> None:
    """Each of these gave NaN or silent nonsense in another library."""
    for check in (very_negative_lse, misaligned, many_heads, offsets_beyond_32_bits):
        try:
            check(run)
            run.row(case=check.__name__, ok=True)
        except Exception as error:
            trace = traceback.format_exc()
            run.row(case=check.__name__, ok=False, error=str(error)[:300], trace=trace)


def inputs(run: Run, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and do."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(run.device, dtype) for _ in range(4)]


def gradients(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, do: Tensor, **keywords):
    """[o, dq, dk, dv]"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = call(q, k, v, **keywords)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def compare(run: Run, q: Tensor, k: Tensor, v: Tensor, do: Tensor, **keywords: Any) -> None:
    """Triton against the reference in fp64, by the error of the reference in the same dtype."""
    actual = gradients(fused_attention, q, k, v, do, backend="triton", **keywords)
    wide = {x: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y
            for x, y in keywords.items()}  # fmt: skip
    exact = [x.double() for x in (q, k, v, do)]
    truth = gradients(fused_attention, *exact, backend="reference", **wide)
    naive = gradients(plain, q, k, v, do, mask=keywords.get("attn_mask"))
    for name, *results in zip(("o", "dq", "dk", "dv"), actual, truth, naive, strict=True):
        assert_close(name, *results)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    s = q.shape[-1] ** -0.5 * q @ k.mT
    return torch.softmax(s if mask is None else s + mask, -1) @ v


def very_negative_lse(run: Run) -> None:
    """lse below -90 with a ragged last tile: 2^(0 - lse) overflows where padding is read as 0."""
    for n in (192, 193) if not run.dryrun else (33,):
        q, k, v, do = inputs(run, 1, 2, n, 64)
        mask = torch.full((1, 1, n, n), -200.0, device=run.device, dtype=q.dtype)
        compare(run, q, k, v, do, attn_mask=mask)
        compare(run, q, k, v, do, attn_mask=mask[:, :, :1])


def misaligned(run: Run) -> None:
    """Storage offsets of one element, rows that are no multiple of 16 bytes, expanded do."""
    n = 130 if not run.dryrun else 20
    whole = [x.flatten() for x in inputs(run, 1, 2, n + 1, 65)]
    strides = (2 * n * 65, n * 65, 65, 1)
    q, k, v, do = (x.as_strided((1, 2, n, 64), strides, 1) for x in whole)
    compare(run, q, k, v, do)
    compare(run, q, k, v, torch.ones((), device=q.device, dtype=q.dtype).expand(q.shape))


def many_heads(run: Run) -> None:
    """More (batch, head) pairs than the second and third axes of a grid can count.

    Three keys: autograd through softmax has half the error in dk of gradients from (o, lse), so
    one evaluation of plain fp32 maths is too narrow a yardstick; Problem has several.
    """
    case = Case("many-heads", batch=70_000 if not run.dryrun else 7, heads=1, nq=3)
    problem = Problem(case, torch.float32, str(run.device))
    problem.check(problem.run("triton"))


def offsets_beyond_32_bits(run: Run) -> None:
    """Keys 2^31 elements apart."""
    stride = 2**31 + 8 if not run.dryrun else 264
    q, _, v, do = inputs(run, 1, 1, 2, 64)
    far = torch.empty(stride + 64, device=run.device, dtype=q.dtype)
    k = far.as_strided((1, 1, 2, 64), (1, 1, stride, 1))
    k.copy_(torch.randn(k.shape))
    compare(run, q, k, v, do)


def race(run: Run) -> None:
    """250 repeats give the same bits, forward and backward."""
    repeats, n = (250, 1000) if not run.dryrun else (2, 20)
    for name, call, qkvd, keywords in race_problems(run, n):
        expected = gradients(call, *qkvd, backend="triton", **keywords)
        differing = 0
        for _ in range(repeats):
            again = gradients(call, *qkvd, backend="triton", **keywords)
            differing += not all(map(torch.equal, again, expected))
        run.row(case=name, repeats=repeats, differing=differing, ok=differing == 0)


def race_problems(run: Run, n: int) -> Iterator[tuple[str, Callable[..., Any], list[Tensor], dict]]:
    for dtype in DTYPES[:2]:
        for dim in (64, 128):
            x = inputs(run, *((4, 8) if not run.dryrun else (1, 1)), n, dim, dtype=dtype)
            for mask, keywords in {
                "full": {},
                "causal": {"is_causal": True},
                "window": {"window": 100},
            }.items():
                yield f"{dtype_id(dtype)} dim{dim} {mask}", fused_attention, x, keywords
        lengths = torch.tensor([n, 0, n // 3, 1])
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(run.device)
        x = inputs(run, int(cu_seqlens[-1]), 8 if not run.dryrun else 1, 64, dtype=dtype)
        keywords = {"cu_seqlens_q": cu_seqlens, "is_causal": True}
        yield f"{dtype_id(dtype)} packed causal", fused_attention_varlen, x, keywords


if __name__ == "__main__":
    check_cases(json.loads(sys.argv[1]), *sys.argv[2:])
