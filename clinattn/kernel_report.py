"""What a Triton kernel compiles to, for any card, on a machine that needs no GPU.

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
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from clinattn.kernels import launch

# Bytes of shared memory that one block can have.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel: resources by thread (registers, local bytes) and block (shared bytes).

    matrix: the families of tensor-core instruction in its PTX. local counts spills and any other
    use of the stack. serialized: each Hopper product waits for the one before, as ptxas does (and
    says in a warning, C7515) when it cannot follow the accumulators.
    """

    name: str
    capability: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int
    local: int
    shared: int
    matrix: frozenset[str]
    serialized: bool
    ttgir: str


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


def inspect(tool: str, *options: str, cubin: bytes) -> str:
    """What a tool that comes with Triton prints of a cubin."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a kernel."""
    text = inspect("cuobjdump", "--dump-resource-usage", cubin=cubin)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def waits_for_each_product(cubin: bytes) -> bool:
    sass = inspect("nvdisasm", "-c", cubin=cubin)
    return 0 < sass.count(" HGMMA.") <= sass.count("WARPGROUP.DEPBAR")


def kernel_reports(call: Callable[[], Any], capability: int) -> list[KernelReport]:
    """Compile every kernel that call() launches for a compute capability such as 90."""
    with captured_launches(capability) as launches:
        call()
    reports = []
    for kernel, keywords in launches:
        compiled = compile_for(kernel, keywords, capability)
        usage = resource_usage(compiled.asm["cubin"])
        reports.append(
            KernelReport(
                name=kernel.fn.__name__.strip("_").removesuffix("_kernel"),
                capability=capability,
                block_m=keywords["BLOCK_M"],
                block_n=keywords["BLOCK_N"],
                num_warps=keywords["num_warps"],
                num_stages=keywords["num_stages"],
                registers=usage["REG"],
                local=usage["LOCAL"] + usage["STACK"],
                shared=compiled.metadata.shared,
                matrix=frozenset(MATRIX_INSTRUCTION.findall(compiled.asm["ptx"])),
                serialized=waits_for_each_product(compiled.asm["cubin"]),
                ttgir=compiled.asm["ttgir"],
            )
        )
    return reports
