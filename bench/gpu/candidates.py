"""Stage of run.py that times what may replace a row of kernels/configs.py, or a whole kernel.

Contests are between the shipped tile, a few other tiles, other kernels, and in the forward pass
cuDNN. dq and dkdv are timed apart. Results are held against those of the shipped tile first. Rows
come as they are measured; one that says which entrant wins, and by how much, ends each contest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.backends.triton import triton_interpreter
from clinattn.kernels import backward, configs, forward, launch
from gpu.dense_shapes import WIDTH
from gpu.jobs import in_processes
from gpu.providers import SDPA_BACKENDS, pinned_sdpa
from gpu.rows import Run
from gpu.tiles import MASKS, Tile, tile_of
from gpu.timing import AGREE, in_turns, relative

Results = tuple[Tensor, ...]
Function = Callable[[], Results]
Kernel = Callable[["KernelInputs"], Results]

ROUNDS = 5
LIMIT = 90.0  # seconds after which no further contest begins
CHECKING = 40.0  # seconds that the checks may take before they are cut off
TYPE = torch.float16 if triton_interpreter() else torch.bfloat16  # numpy has no bf16
SHAPE = {"keys": (4, 4096), "plain": (2, 8192)}  # batch and length by kind
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}  # of 2 D FLOP a pair, in the kernel that is timed


@dataclass(frozen=True)
class Contest:
    """Tiles against the shipped one of a table, for calls of a kind as configs.Rows names them."""

    table: str
    dim: int
    kind: str
    masks: tuple[str, ...]
    tiles: tuple[Tile, ...]


BOTH = ("full", "causal")
KEYS = ("bool keys", "float keys")
# The most decisive first. None of these tiles takes stack for sm_90, except that (32, 128)
# with a key mask takes 8 to 24 bytes under Triton 3.8; those of 4 warps leave room for a second
# block on a multiprocessor.
CONTESTS = (
    Contest("forward", 128, "plain", BOTH, ((128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3))),
    Contest(
        *("dkdv", 128, "keys", KEYS),
        ((32, 128, 8, 3), (32, 128, 8, 2), (16, 128, 8, 3), (16, 64, 4, 3)),
    ),
    Contest("dq", 128, "plain", BOTH, ((128, 64, 8, 3), (64, 64, 4, 2))),
    Contest("dkdv", 128, "plain", BOTH, ((32, 128, 8, 2), (32, 128, 8, 4), (32, 64, 4, 3))),
    Contest("forward", 64, "plain", BOTH, ((128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3))),
    Contest("dq", 64, "plain", BOTH, ((128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2))),
    Contest("dkdv", 64, "plain", BOTH, ((64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3))),
)
DRY_CONTESTS = (
    Contest("forward", 16, "plain", BOTH, ((32, 16, 4, 1),)),
    Contest("dq", 16, "plain", ("full",), ((32, 16, 4, 1),)),
    Contest("dkdv", 16, "keys", KEYS, ((16, 32, 4, 1),)),
)


def candidates(run: Run) -> None:
    if "triton" not in run.backends:
        run.row(skipped="candidates: they are Triton's")
        return
    began = time.monotonic()
    working = working_entrants(run)
    for contest in contests(run.dryrun):
        what = f"the contest of {contest.table} D {contest.dim} {contest.kind}"
        if not run.enough_time(5, what):
            return
        if time.monotonic() - began > LIMIT and not run.dryrun:
            run.row(skipped=what, after_s=round(time.monotonic() - began))
            continue
        hold(contest, working, run)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def contests(dryrun: bool) -> tuple[Contest, ...]:
    return DRY_CONTESTS if dryrun else CONTESTS


# Problems


class KernelInputs:
    """Inputs of one kernel, and the results and sums of the kernels before it, by shipped tiles."""

    def __init__(
        self, table: str, dim: int, mask: str, batch: int, n: int, device: torch.device
    ) -> None:
        shape = (batch, max(1, WIDTH // dim) if n > 64 else 1, n, dim)
        q, k, v, self.do = (torch.randn(shape, device=device).to(TYPE) for _ in range(4))
        hidden = torch.arange(batch, device=device) * n // (2 * batch)  # none to 3/8 of the keys
        kept = (torch.arange(n, device=device) < n - hidden[:, None])[:, None, None]
        keys = {
            "bool keys": kept,
            "float keys": torch.zeros(kept.shape, device=device).masked_fill(~kept, -torch.inf),
        }.get(mask)
        if mask == "float keys":
            keys = keys.to(TYPE)
        self.table = table
        self.call = Arguments(q, k, v, keys, scale=dim**-0.5, window_right=MASKS.get(mask, -1))
        pairs = n * (n + 1) // 2 if mask == "causal" else n * n
        share = 1.0 if keys is None else kept.float().mean().item()
        self.flops = 2 * PRODUCTS[table] * dim * shape[0] * shape[1] * pairs * share
        self.sums: dict[str, Tensor] = {}  # by row, that dq leaves for dkdv

    def prepare(self) -> None:
        """The shipped forward pass, and for dkdv the sums that dq leaves for it."""
        if self.table != "forward":
            self.outputs = forward.attention_forward(self.call)
            with only("dq", {}) as launched:
                backward.attention_backward(self.do, None, *self.outputs, self.call)
            self.sums = {name: launched[name] for name in ("shift_ptr", "delta_ptr")}

    def run(self) -> Results:
        """The results of the kernel, launched with nothing else."""
        if self.table == "forward":
            return forward.attention_forward(self.call)[:2]
        with only(self.table, self.sums if self.table == "dkdv" else {}):
            dq, dk, dv, *_ = backward.attention_backward(self.do, None, *self.outputs, self.call)
        return (dq,) if self.table == "dq" else (dk, dv)


@contextlib.contextmanager
def only(table: str, sums: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """The backward pass launches the kernel of this table alone, with these sums.

    Gives the keywords of that launch, once it was made.
    """
    kernel, shipped = getattr(backward, f"{table}_kernel"), launch.KernelProblem.launch
    launched: dict[str, Any] = {}

    def launch_one(
        problem: launch.KernelProblem, asked: Any, *arguments: Any, **keywords: Any
    ) -> None:
        if asked is kernel:
            launched.update(keywords | sums)
            shipped(problem, asked, *arguments, **launched)

    with mock.patch.object(launch.KernelProblem, "launch", launch_one):
        yield launched


def with_tile(problem: KernelInputs, tile: Tile) -> Results:
    with tile_of(problem.table, tile):
        return problem.run()


def shipped_tile(contest: Contest, capability: tuple[int, int]) -> Tile:
    config = configs.tile_config(contest.table, capability, contest.dim, TYPE, contest.kind)
    return config.block_m, config.block_n, config.num_warps, config.num_stages


# Other kernels


def other_kernels(contest: Contest) -> dict[str, Kernel]:
    """Kernels that no call is routed to, by name; those that cannot load are not there.

    A kernel joins a contest by an entry here.
    """
    kernels: dict[str, Kernel] = {}
    if contest.kind != "plain":
        return kernels
    if contest.table == "forward":
        with contextlib.suppress(ImportError):
            kernels |= gluon_kernels(contest.dim)
    return kernels


def gluon_kernels(dim: int) -> dict[str, Kernel]:
    """The shipped schedule, and those that its variants make of it."""
    gluon = importlib.import_module("clinattn.kernels.forward_gluon")

    def forward_pass(schedule: Any, problem: KernelInputs) -> Results:
        return gluon.attention_forward_gluon(problem.call, schedule=schedule)

    shipped = gluon.SCHEDULES.get(dim)
    schedules = {"gluon": shipped} if shipped else {}
    for name, change in gluon.VARIANTS.items() if shipped else ():
        if shipped._replace(**change) not in schedules.values():
            schedules[f"gluon {name}"] = shipped._replace(**change)
    return {name: functools.partial(forward_pass, x) for name, x in schedules.items()}


def working_entrants(run: Run) -> set[tuple[Any, ...]]:
    """(table, dim, kind, name) of those that give right results, checked in processes beside this.

    A kernel whose warps wait for each other can hang, and a wrong address ends a process. What was
    not compiled ahead of time is compiled here, in all processes at once.
    """
    of_tiles, of_kernels = [], []
    for i, contest in enumerate(contests(run.dryrun)):
        of_tiles += [[i, mask, tile] for mask in contest.masks for tile in contest.tiles]
        names = list(other_kernels(contest))
        of_kernels += [[i, mask, name] for mask in contest.masks for name in names]
    working, out = set(), set()
    # Tiles first: what comes after a job that hangs is not checked.
    for row, left in in_processes("gpu.candidates:check_job", of_tiles + of_kernels, run, CHECKING):
        for i, mask, entrant in left:
            key = entrant_key(contests(run.dryrun)[i], entrant)
            out.add(key)
            run.row(**labels(key), mask=mask, skipped="its check, for want of time")
        if row is not None:
            i, mask, entrant = row["job"]
            key = entrant_key(contests(run.dryrun)[i], entrant)
            working.add(key)
            if not row["ok"]:
                out.add(key)
                run.row(**labels(key), mask=mask, dropped=row["error"][-300:])
    return working - out


def entrant_key(contest: Contest, entrant: Any) -> tuple[Any, ...]:
    name = entrant if isinstance(entrant, str) else str(tuple(entrant))
    return contest.table, contest.dim, contest.kind, name


def labels(key: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("table", "dim", "kind", "entrant"), key, strict=True))


def check_job(job: list[Any], device: str) -> dict[str, Any]:
    """Checks that an entrant gives the results of the shipped tile, and the same ones twice."""
    i, mask, entrant = job
    contest = contests(device == "cpu")[i]
    try:
        for problem in problems_to_check(contest, mask, entrant, torch.device(device)):
            problem.prepare()
            run = function_of(contest, problem, entrant)
            expected, first, second = problem.run(), run(), run()
            far = distance(first, expected)
            if not far < AGREE:
                return {"ok": False, "error": f"{far} from the shipped kernel's results"}
            if not all(map(torch.equal, first, second)):
                return {"ok": False, "error": "another result the second time"}
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"ok": True}


def function_of(contest: Contest, problem: KernelInputs, entrant: Any) -> Function:
    if isinstance(entrant, str):
        return functools.partial(other_kernels(contest)[entrant], problem)
    return functools.partial(with_tile, problem, tuple(entrant))


def problems_to_check(
    contest: Contest, mask: str, entrant: Any, device: torch.device
) -> Iterator[KernelInputs]:
    """Small problems; for another kernel also one with a partial tile and one of timed length."""
    sizes = [(2, 256)] if device.type == "cuda" else [(2, 40)]
    if isinstance(entrant, str) and device.type == "cuda":
        sizes += [(1, 1000), SHAPE[contest.kind]]
    for batch, n in sizes:
        yield KernelInputs(contest.table, contest.dim, mask, batch, n, device)


def distance(results: Results, expected: Results) -> float:
    """The largest relative distance; inf where only one of them is finite."""
    far = [relative(x.float(), y.float()) for x, y in zip(results, expected, strict=True)]
    return max(x if x == x else float("inf") for x in far)


# Contests


def entrants(
    contest: Contest, problem: KernelInputs, mask: str, run: Run, working: set[tuple[Any, ...]]
) -> dict[str, Function]:
    """The functions to time, by name; the shipped tile comes first."""
    shipped = shipped_tile(contest, launch.device_capability(run.device))
    functions = {str(shipped): function_of(contest, problem, shipped)}
    for other in (*contest.tiles, *other_kernels(contest)):
        if entrant_key(contest, other) in working:
            functions[str(other)] = function_of(contest, problem, other)
    if contest.table == "forward":
        q, k, v = problem.call[:3]
        cudnn = SDPA_BACKENDS["sdpa-cudnn"]
        functions["sdpa-cudnn"] = lambda: (pinned_sdpa(cudnn, None, mask == "causal", q, k, v),)
    return functions


def hold(contest: Contest, working: set[tuple[Any, ...]], run: Run) -> None:
    """Times a contest on each of its masks; an entrant that fails is out."""
    ms: dict[str, list[float]] = {}
    of_contest: dict[str, Any] = dict(table=contest.table, kind=contest.kind, dim=contest.dim)
    for mask in contest.masks:
        batch, n = SHAPE[contest.kind] if not run.dryrun else (2, 40)
        problem = KernelInputs(contest.table, contest.dim, mask, batch, n, run.device)
        problem.prepare()
        fields = of_contest | dict(mask=mask, batch=batch, n=n)
        functions = agreeing(entrants(contest, problem, mask, run, working), run, fields)
        failed: dict[str, str] = {}
        for name, result in in_turns(functions, run, ROUNDS, failed=failed).items():
            ms.setdefault(name, []).append(result["ms"])
            tflops = problem.flops / result["ms"] / 1e9
            run.row(**fields, entrant=name, **result, tflops=tflops)
        for name, error in failed.items():
            run.row(**fields, entrant=name, failed=error)
    means = {
        name: statistics.geometric_mean(values)
        for name, values in ms.items()
        if len(values) == len(contest.masks)
    }
    verdict(contest, means, of_contest, run)


def agreeing(
    functions: dict[str, Function], run: Run, fields: dict[str, Any]
) -> dict[str, Function]:
    """Keeps the functions that run and agree with the first one, the shipped tile."""
    expected: Results | None = None
    kept = {}
    for name, function in functions.items():
        try:
            results = function()
            if expected is None:
                expected = results
            far = distance(results, expected[: len(results)])
        except Exception as error:
            # Without the shipped tile there is nothing to compare, and that is a failure.
            why = {"ok": False} if expected is None else {}
            run.row(**fields, entrant=name, failed=str(error).strip()[:300], **why)
            if expected is None:
                return {}
            continue
        if far < AGREE:
            kept[name] = function
        else:
            run.row(**fields, entrant=name, wrong=far)
    return kept


def verdict(
    contest: Contest, means: dict[str, float], of_contest: dict[str, Any], run: Run
) -> None:
    """Rows with the best tile, and with what each other kernel gains, by geometric means of ms."""
    shipped = shipped_tile(contest, launch.device_capability(run.device))
    if str(shipped) not in means:
        run.row(**of_contest, skipped="a verdict: the shipped tile has no time")
        return
    tiles = [tile for tile in dict.fromkeys((shipped, *contest.tiles)) if str(tile) in means]
    best = min(tiles, key=lambda tile: means[str(tile)])
    gain = means[str(shipped)] / means[str(best)]
    run.row(**of_contest, best=best, shipped=shipped, times_as_fast=gain)
    for name in other_kernels(contest):
        if name in means:
            times = {"times_as_fast": means[str(shipped)] / means[name]}
            if "sdpa-cudnn" in means:
                times["times_as_fast_as_cudnn"] = means["sdpa-cudnn"] / means[name]
            run.row(**of_contest, kernel=name, **times)


# Calls compiled ahead of time


def calls_to_record(device: torch.device) -> Iterator[Callable[[], Any]]:
    """Every launch of this stage, on inputs as small as give the same kernels."""
    for contest in CONTESTS:
        for mask in contest.masks:
            problem = KernelInputs(contest.table, contest.dim, mask, 2, 256, device)
            yield problem.prepare
            yield problem.run
            for tile in contest.tiles:
                yield functools.partial(with_tile, problem, tile)
            if kernels := other_kernels(contest):
                odd = KernelInputs(contest.table, contest.dim, mask, 1, 1000, device)
                yield odd.prepare
                yield odd.run
                for kernel in kernels.values():
                    yield functools.partial(kernel, problem)
                    yield functools.partial(kernel, odd)
