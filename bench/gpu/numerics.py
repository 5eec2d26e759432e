"""Stage of run.py that asks whether the results are right, configuration by configuration."""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import OutOfResources

from clinattn.kernels import configs, launch
from gpu.jobs import in_processes
from gpu.rows import Run
from gpu.table_of_cases import CASES, FEATURES, Case, Problem

DTYPES = ("bfloat16", "float32", "float16")
OUTCOMES = {True: "passed", False: "failed", None: "not run"}
TF32 = "tf32"  # fp32 under torch.set_float32_matmul_precision("high")

# Each row of the tables in kernels/configs.py, at the head dim it is for and at one that it rounds
# up. Most have the cotangents of training, o alone: the kernels that the later stages need, too.
KINDS: dict[str, dict[str, Any]] = {
    "full": {"cotangent": "o"},
    "causal": {"causal": True, "cotangent": "o"},
    "window": {"window": 40, "cotangent": "o"},
    "gqa": {"heads": 4, "kv_heads": 2, "causal": True},
    "keys": {"mask": "left:b11k", "window": (50, 9)},
    "pairs": {"mask": "float:bhqk"},
    "packed": {"nq": (300, 0, 1, 129), "nk": (390, 4, 1, 129), "window": (60, 60)},
}
CONFIGURED = [
    Case(f"dim{dim}-{kind}", dim=dim, **{"nq": 300, "nk": 390, **keywords})
    for dim in (64, 128, 256, 16, 40, 96, 200)
    for kind, keywords in KINDS.items()
]
# Rows for other cards run here as well, if with other instructions than there.
ELSEWHERE = [f"dim{dim}-{kind}" for dim in (64, 128, 256) for kind in ("causal", "pairs")]

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
    *(Case(f"dim{d}-long", nq=1100, dim=d) for d in (32, 64, 72, 128, 160, 256)),
    Case("packed-large", heads=4, kv_heads=2, nq=(1000, 0, 3, 517), dim=64, causal=True),
    Case("packed-large-window", nq=(130, 900, 64), dim=128, window=100),
    Case("bias-large", nq=500, dim=64, mask="float:1hqk"),
]
DRYRUN_JOBS = [
    *(("one-query", dtype, 0) for dtype in (*DTYPES, TF32)),
    ("causal", "bfloat16", 80),
    ("packed-tail", "float32", 0),
    ("dropout-packed", "float32", 0),
]
TABLE = {case.id for case in (*CASES, *FEATURES)}
BY_ID = {case.id: case for case in (*CASES, *FEATURES, *CONFIGURED, *TAILS, *LARGE)}

# (backend, case, dtype, card whose configurations to take, or 0)
Job = tuple[str, str, str, int]


def numerics(run: Run) -> None:
    """Head dims 64 and 128, then the tests' table of cases, in bf16 and fp32, against fp64."""
    check_jobs(run, [job for job in jobs_of(run.backends, run.dryrun) if is_core(job)])


def numerics_rest(run: Run) -> None:
    """Every other configuration, head dim and dtype."""
    check_jobs(run, [job for job in jobs_of(run.backends, run.dryrun) if not is_core(job)])


def is_core(job: Job) -> bool:
    _, case, dtype, card = job
    usual = case in TABLE or BY_ID[case].dim in (64, 128)
    return usual and dtype in ("bfloat16", "float32") and not card


def check_jobs(run: Run, jobs: list[Job]) -> None:
    """A row for each failure as it comes, and at the end one for each group of cases."""
    counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    names = {id: name for name, ids in groups().items() for id in ids}

    def counted(backend: str, case: str, dtype: str, card: int) -> Counter[str]:
        group = f"{names[case]}, rows of sm_{card}" if card else names[case]
        return counts[backend, group, dtype]

    for row, left in in_processes("gpu.numerics:check_job", jobs, run, run.left()):
        if row is not None:
            backend, case, dtype, card = row.pop("job")
            counted(backend, case, dtype, card)[OUTCOMES[row["ok"]]] += 1
            if row["ok"] is False:
                run.row(backend=backend, case=f"{case} {dtype}", rows_of=card, **row)
        for job in left:
            counted(*job)["not run"] += 1
    for (backend, group, dtype), count in sorted(counts.items()):
        passed, failed = count["passed"], count["failed"]
        run.row(backend=backend, cases=group, dtype=dtype, passed=passed, failed=failed)
        if count["not run"]:
            run.row(backend=backend, skipped=f"{count['not run']} of {group}, {dtype}")


def groups() -> dict[str, list[str]]:
    tables = {
        "configurations": CONFIGURED,
        "tails": TAILS,
        "large": LARGE,
        "table of cases": CASES,
        "features": FEATURES,
    }
    return {name: [case.id for case in cases] for name, cases in tables.items()}


def jobs_of(backends: list[str], dryrun: bool) -> Iterator[Job]:
    """The most important ones first; before them those of backends that compile nothing here."""
    for backend in sorted(backends, key=lambda name: name == "triton"):
        for case, dtype, card in DRYRUN_JOBS if dryrun else jobs_of_triton():
            if backend == "triton" or not (card or dtype == TF32):  # the others have neither
                yield backend, case, dtype, card


def jobs_of_triton() -> list[tuple[str, str, int]]:
    ids = groups()
    configured = [(case, dtype, 0) for case in ids["configurations"] for dtype in (*DTYPES, TF32)]
    others = [(case, "bfloat16", card) for case in ELSEWHERE for card in configs.TABLES["forward"]]
    rest = [
        (case, dtype, 0)
        for dtype in DTYPES
        for case in (*ids["tails"], *ids["large"], *ids["table of cases"], *ids["features"])
    ]
    return [*configured, *others, *rest]


def check_job(job: Job, device: str) -> dict[str, Any]:
    backend, name, dtype, card = job
    # Fills what torch.empty gives with NaN, so that an unwritten result shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    capability = launch.device_capability
    if card:
        launch.device_capability = lambda _: divmod(card, 10)
    try:
        check(backend, BY_ID[name], dtype, device)
        return {"ok": True}
    except OutOfResources as error:  # another card has more shared memory
        return {"ok": None if card else False, "error": str(error)}
    except Exception as error:
        return {"ok": False, "error": str(error)[:300], "trace": traceback.format_exc()[-1500:]}
    finally:
        launch.device_capability = capability


def check(backend: str, case: Case, dtype: str, device: str) -> None:
    if dtype != TF32:
        problem = Problem(case, getattr(torch, dtype), device)
        problem.check(problem.run(backend))
        return
    problem = Problem(case, torch.float32, device)
    torch.set_float32_matmul_precision("high")
    try:
        actual = problem.run(backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    with Tf32Products():
        problem.naive  # noqa: B018  (kept by the problem for its check)
    problem.check(actual)


class Tf32Products(TorchDispatchMode):
    """Matrix products of fp32 as tensor cores take them: each operand loses its last 13 bits.

    cuBLAS chooses tf32 for some shapes only, so its own error is no yardstick.
    """

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS and args[0].dtype == torch.float32:
            args = [(x.view(torch.int32) & -(1 << 13)).view(torch.float32) for x in args]
        return func(*args, **(kwargs or {}))
