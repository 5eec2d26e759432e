"""Reports on Triton kernels compiled for any card, on a machine that needs no GPU.

The launchers run with the launch itself replaced, so that what is compiled here is what they would
launch: the same arguments, alignment facts, tile configuration and options.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from clinattn.backends import call as records
from clinattn.backends.call import MAX_TOP, Arguments, Summary
from clinattn.kernels import backward, configs, forward, launch, summary
from clinattn.tools.compiled.sass import Loop, loops

# A reduction for each kind of summary kernel: the gradient takes less than relevance, and the
# largest weight less than entropy.
REDUCTIONS = {
    "received": records.RECEIVED,
    "relevance": records.RELEVANCE,
    "entropy": records.ENTROPY,
    "topk": records.TOPK,
}
# Products of a pass for each pair of a query and a key, each of 2 D FLOP.
PRODUCTS = {
    "forward": 2,
    "dq": 3,
    "dkdv": 4,
    "dkdv in turns": 5,
    "mask_gradient": 2,
    "relative_gradient": 2,
    **{name: 2 if name == "relevance" else 1 for name in REDUCTIONS},
}
# Resources of one multiprocessor, the same on every card.
REGISTERS, THREADS, SCHEDULERS, EXP_LANES = 65_536, 2048, 4, 16


@dataclass(frozen=True)
class Card:
    """Multiprocessor of a card: bytes of shared memory, in all and for one block; FLOP a cycle
    of 16-bit products on the tensor cores; lanes of fp32 multiply-adds. From NVIDIA's tuning guides
    for Ampere, Hopper and Blackwell and the data sheets of A100, H100 and B200.
    """

    shared: int
    block_shared: int
    tensor_flops: int
    fma_lanes: int


CARDS = {
    80: Card(167_936, 166_912, 2048, 64),
    90: Card(233_472, 232_448, 4096, 128),
    100: Card(233_472, 232_448, 8192, 128),
}


@dataclass(frozen=True)
class KernelReport:
    """A compiled kernel: resources by thread (registers, local bytes) and block (shared bytes).

    local counts spills and any other use of the stack. loops: those over tiles.
    """

    name: str
    capability: int
    block_m: int
    block_n: int
    block_d: int
    itemsize: int
    num_warps: int
    num_stages: int
    registers: int
    local: int
    shared: int
    loops: list[Loop]
    ttgir: str

    @property
    def blocks(self) -> int:
        """Blocks that are resident on a multiprocessor at a time."""
        threads = 32 * self.num_warps
        registers = -(-self.registers // 8) * 8 * threads
        shared = self.shared + 1024  # which the driver keeps for itself
        return min(
            THREADS // threads, REGISTERS // registers, CARDS[self.capability].shared // shared
        )

    @property
    def serialized(self) -> bool:
        """True where products run one after another, as ptxas has them (and warns, C7515) if it
        cannot follow the accumulators."""
        return any(loop.serialized for loop in self.loops)

    @property
    def in_turns(self) -> bool:
        """True where dV and dK have loops of their own, one after the other."""
        return self.name == "dkdv" and self.block_d > 128 and self.itemsize == 2

    @cached_property
    def full_loop(self) -> Loop:
        """The loop over whole tiles without masks, or the sum of both where there are two."""
        turns = 2 if self.in_turns else 1
        each = len(self.loops) // turns
        parts = [self.loops[i * each : (i + 1) * each] for i in range(turns)]
        first, *rest = (min(part, key=lambda x: (-x.exp, x.instructions)) for part in parts)
        return sum(rest, first)

    @property
    def matrix_cycles(self) -> float:
        """Cycles that the products of a full tile keep the tensor cores, or fp32 lanes, busy."""
        card = CARDS[self.capability]
        if not self.full_loop.tensor:
            return 32 * self.num_warps * self.full_loop.fma / card.fma_lanes
        products = PRODUCTS["dkdv in turns" if self.in_turns else self.name]
        flops = 2 * products * self.block_m * self.block_n * self.block_d
        return flops / card.tensor_flops * self.itemsize / 2

    @property
    def exp_cycles(self) -> float:
        """Cycles that the exponentials of a full tile keep the special function units busy."""
        return 32 * self.num_warps * self.full_loop.exp / EXP_LANES

    @property
    def issue_cycles(self) -> float:
        """Cycles that the schedulers need to issue all instructions of a full tile."""
        return self.num_warps * self.full_loop.instructions / SCHEDULERS

    @property
    def groups(self) -> int:
        """Groups of warps of a multiprocessor that need not keep in step: its blocks, or their
        groups of four warps where the loop has no barrier."""
        return self.blocks * (1 if self.full_loop.barriers else max(1, self.num_warps // 4))

    @property
    def ceiling(self) -> float:
        """Share of the peak of the matrix units that the code leaves possible.

        A group of warps that waits for its products does its softmax while they rest: then only
        the products of other groups fill that time.
        """
        others = max(self.exp_cycles, self.issue_cycles)
        longest = max(self.matrix_cycles, others)
        if self.full_loop.waits:
            longest = max(longest, (self.matrix_cycles + others) / self.groups)
        return self.matrix_cycles / longest


@contextmanager
def captured_launches(capability: int) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Collect (kernel, keywords and grid) of the launches in the block instead of launching."""
    launches: list[tuple[Any, dict[str, Any]]] = []

    def run(self: Any, *, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append((self, keywords | {"grid": grid}))

    major_minor = divmod(capability, 10)
    with (
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.object(launch, "device_capability", lambda device: major_minor),
    ):
        yield launches


def compile_for(kernel: Any, keywords: dict[str, Any], capability: int) -> Any:
    """Compile a kernel as its launch with these keywords would, for a card that need not exist."""
    keywords = {name: value for name, value in keywords.items() if name != "grid"}
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**keywords)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def triton_tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm, which come with Triton."""
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def inspect(tool: str, *options: str, cubin: bytes) -> str:
    """Output of a tool that comes with Triton, for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton_tool(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a kernel."""
    text = inspect("cuobjdump", "--dump-resource-usage", cubin=cubin)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def kernel_reports(call: Callable[[], Any], capability: int) -> list[KernelReport]:
    """Compile every kernel that call() launches for a compute capability such as 90."""
    with captured_launches(capability) as launches:
        call()
    reports = []
    for kernel, keywords in launches:
        compiled = compile_for(kernel, keywords, capability)
        usage = resource_usage(compiled.asm["cubin"])
        sass = inspect("nvdisasm", "-c", cubin=compiled.asm["cubin"])
        reports.append(
            KernelReport(
                name=pass_name(kernel, keywords),
                capability=capability,
                block_m=keywords["BLOCK_M"],
                block_n=keywords["BLOCK_N"],
                block_d=keywords["form"].BLOCK_D,
                itemsize=keywords["inputs"].q.element_size(),
                num_warps=keywords["num_warps"],
                num_stages=keywords["num_stages"],
                registers=usage["REG"],
                local=usage["LOCAL"] + usage["STACK"],
                shared=compiled.metadata.shared,
                loops=loops(sass),
                ttgir=compiled.asm.get("ttgir", ""),  # not kept with TRITON_STORE_BINARY_ONLY
            )
        )
    return reports


def pass_name(kernel: Any, keywords: dict[str, Any]) -> str:
    """Returns the name in PRODUCTS of what a launch computes."""
    for name, number in REDUCTIONS.items():
        if keywords.get("REDUCE") == number:
            return name
    return kernel.fn.__name__.strip("_").removesuffix("_kernel")


def zeros(
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int | None = None,
    left: int = -1,
    right: int = -1,
    mask: tuple[int, int, int, int] | None = None,
    bias: bool = False,
    packed: bool = False,
    group: int = 1,
    lengths: bool = False,
    intervals: bool = False,
    terms: bool = False,
    dropout: bool = False,
) -> Arguments:
    """Returns a call of this kind, of 256 zeros.

    value_dim: of v, by default head_dim. bias: the mask has numbers to add. intervals: bounds of
    the keys by query, and a global prefix. terms: all that is added to scores or done to them.
    """
    n, heads, kv_heads = 256, 4, 4 // group
    sizes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim or head_dim))
    q, k, v = (torch.zeros((n, h, d) if packed else (2, h, n, d), dtype=dtype) for h, d in sizes)
    cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
    ends = torch.zeros(2, dtype=torch.int32) if lengths else None
    bounds = torch.zeros(2, n, dtype=torch.int32) if intervals else None
    return Arguments(
        *(q, k, v),
        mask=None if mask is None else torch.ones(mask, dtype=dtype if bias else torch.bool),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        q_lengths=ends,
        kv_start=ends,
        kv_end=ends,
        scale=0.1,
        window_left=left,
        window_right=right,
        lo=bounds,
        hi=bounds,
        global_prefix=1 if intervals else 0,
        times=torch.zeros(2, n) if terms else None,
        decay=torch.zeros(heads) if terms else None,
        slopes=torch.zeros(2, heads) if terms else None,
        relative=torch.zeros(heads, 257) if terms else None,
        softcap=30.0 if terms else 0.0,
        seed=torch.zeros(1, dtype=torch.long) if dropout else None,
        dropout_p=0.1 if dropout else 0.0,
    )


def both_passes(head_dim: int, dtype: torch.dtype, *, needs: int = 0, **kind: Any) -> None:
    """Calls the launchers of forward and backward; kind: as in zeros, needs: as the latter has."""
    call = zeros(head_dim, dtype, **kind)
    o, lse, lse_low = forward.attention_forward(call)
    backward.attention_backward(o, None, o, lse, lse_low, call, needs)


def summaries(head_dim: int, dtype: torch.dtype, **kind: Any) -> None:
    """Calls the launchers of all kernels of summaries; kind: as in zeros."""
    call = zeros(head_dim, dtype, **kind)
    problem = launch.KernelProblem(call)
    lse = problem.empty_lse()
    inputs = Summary(lse, lse, lse, problem.empty_output())
    for number in REDUCTIONS.values():
        summary.attention_summary(call, inputs, number, MAX_TOP)


# A call of each kind that configs.Rows has a row for.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"right": 0},
    "window": {"left": 64, "right": 64},
    "pairs": {"mask": (2, 1, 256, 256)},
}


def shipped_reports(capability: int) -> Iterator[tuple[str, list[KernelReport]]]:
    """(kind of call, reports of its kernels) for every row of the configuration tables."""
    for bits, by_dim in configs.FORWARD[capability].items():
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        for head_dim in by_dim:
            for kind, arguments in KINDS.items():
                of_kind = partial(both_passes, head_dim, dtype, **arguments)
                reports = kernel_reports(of_kind, capability)
                if kind == "plain":  # the row that serves all summaries
                    of_kind = partial(summaries, head_dim, dtype, **arguments)
                    reports += kernel_reports(of_kind, capability)
                yield kind, reports
