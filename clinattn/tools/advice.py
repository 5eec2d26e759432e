"""Advice on what is slower here than it could be: small checks of a machine's facts.

Each check returns a line, what is slow and then the remedy, or None where it finds nothing. What a
line claims was measured (bench/NOTES.md) or is documented by whom it concerns.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from clinattn.integrations.replace import several
from clinattn.tools import installation
from clinattn.tools.cpus import Cpus
from clinattn.tools.instruction_sets import NAMES, InstructionSet


@dataclass(frozen=True)
class Machine:
    """Facts that the checks look at.

    environ: the environment variables. threads: torch's. sets: the table of instruction sets.
    flags: the processor's features by Linux's names. huge_pages: "always", "madvise" or "never",
    None where nothing tells. other_work: fields of other_work.beside, taken just now. against: the
    reasons against each backend. interpreted: whether Triton kernels run in Python. cuda: whether
    torch sees a GPU.
    """

    environ: Mapping[str, str]
    threads: int
    cpus: Cpus
    sets: tuple[InstructionSet, ...]
    flags: frozenset[str]
    huge_pages: str | None
    other_work: Mapping[str, Any]
    against: Mapping[str, list[str]]
    interpreted: bool
    cuda: bool

    @property
    def best(self) -> int:
        """The place of the best usable instruction set among NAMES."""
        return max((NAMES.index(x.name) for x in self.sets if x.usable), default=0)

    def on(self, variable: str) -> bool:
        """Returns whether a variable of torch or CUDA is set to 1."""
        return self.environ.get(variable, "") == "1"


def no_cpu_kernels(here: Machine) -> str | None:
    if not here.against["cpu"]:
        return None
    return f"calls with CPU tensors take the slow reference; {installation.to_build()}"


def no_gpu_kernels(here: Machine) -> str | None:
    if not here.cuda or not here.against["triton"]:
        return None
    line = f"no Triton kernels on this GPU: {'; '.join(here.against['triton'])}"
    if here.against["cuda"]:
        line += f". No CUDA kernels either: {'; '.join(here.against['cuda'])}"
    return line


def set_not_built(here: Machine) -> str | None:
    """A set that the processor has, and for which the compiler was too old."""
    names = [x.name for x in here.sets if not x.built and not x.lacking]
    if not names or not here.flags:
        return None
    return (
        f"the processor has {' and '.join(names)}, for which this build has no kernels; build with "
        "a newer compiler (CXX=... make ext), or install a wheel"
    )


def amx_refused(here: Machine) -> str | None:
    """AMX that the processor has, and the kernel does not give to this process."""
    refused = [x for x in here.sets if x.name == "amx" and x.built and not x.usable]
    if not refused or not {"amx_tile", "amx_bf16"} <= here.flags or refused[0].lacking:
        return None
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    if found and (int(found[1]), int(found[2])) < (5, 16):
        remedy = f"Linux 5.16 and later give it, and this is {platform.release()}"
    else:
        remedy = "let the container, sandbox or virtual machine permit arch_prctl to request it"
    return f"amx, the fastest set, is out of use: {refused[0].reason}; {remedy}"


def hidden_by_hypervisor(here: Machine) -> str | None:
    """Every server since 2015 has AVX2; a virtual machine without it was given an older model."""
    hidden = any(x.name == "avx2" and x.lacking for x in here.sets)
    if not hidden or "hypervisor" not in here.flags:
        return None
    return (
        "the hypervisor of this virtual machine hides avx2 and what came after; ask its "
        'administrator for the processor type "host"'
    )


def threads(here: Machine) -> str | None:
    """torch's threads against cores, affinity mask and quota."""
    allowed, cores, quota = here.cpus
    has, useful = here.threads, here.cpus.useful
    if pinned(here):  # the affinity mask is that of the first thread
        return None
    remedy = setting(here, useful)
    if quota is not None and has > max(1, quota):
        return (
            f"torch has {has} threads, and its control group the time of {quota:g} CPUs (cpu.max): "
            f"all threads are stopped when that is used up; {remedy}"
        )
    if has > allowed:
        return f"torch has {has} threads on {several(allowed, 'CPU')}; {remedy}"
    if has > cores:
        return (
            f"torch has {has} threads on {several(cores, 'core')}, and two on one core share its "
            f"units; {remedy}"
        )
    if has < useful:
        return (
            f"torch has {several(has, 'thread')}, and {useful} would have a core each; {remedy}, "
            "unless other work needs the rest"
        )
    return None


def setting(here: Machine, count: int) -> str:
    """The remedy that gives torch this number of threads. MKL's variable goes before OpenMP's."""
    name = "MKL_NUM_THREADS" if here.environ.get("MKL_NUM_THREADS") else "OMP_NUM_THREADS"
    return f"set {name}={count}, or call torch.set_num_threads({count})"


def pinned(here: Machine) -> str | None:
    """Threads that OpenMP binds to CPUs, and with them whatever the first of them starts."""
    binding = {name: here.environ.get(name, "") for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY")}
    found = [f"{name}={x}" for name, x in binding.items() if x and x.lower() != "false"]
    if not found or not here.cpus.allowed == 1 < here.threads:
        return None
    return (
        f"{found[0]} binds the first thread to one CPU, and with it all that it starts, such as "
        f"the workers of a DataLoader; unset {found[0].partition('=')[0]}, or call "
        "os.sched_setaffinity in them"
    )


def variable_of_no_effect(here: Machine) -> str | None:
    asked = here.environ.get("TORCH_NUM_THREADS", "")
    if asked in ("", str(here.threads)):
        return None
    return (
        f"TORCH_NUM_THREADS={asked} has no effect: torch does not read it; OMP_NUM_THREADS={asked} "
        "sets its threads"
    )


def torch_capped(here: Machine) -> str | None:
    """A variable that keeps torch's own operators on older instructions."""
    asked = here.environ.get("ATEN_CPU_CAPABILITY", "")
    best = NAMES[min(here.best, NAMES.index("avx512"))]
    if asked not in ("default", "avx2") or asked == best or best == "scalar":
        return None
    return (
        f"ATEN_CPU_CAPABILITY={asked} keeps torch's own operators from {best}; unset "
        "ATEN_CPU_CAPABILITY"
    )


# Values of oneDNN's variable, by the best of our sets whose instructions they allow
ONEDNN = {
    **dict.fromkeys(("SSE41", "AVX"), "scalar"),
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), "avx2"),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), "avx512"),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), "avx512_bf16"),
}


def onednn_capped(variable: str, here: Machine) -> str | None:
    """A variable that keeps torch's products in 16 bits on older instructions."""
    asked = here.environ.get(variable, "")
    allowed, best = ONEDNN.get(asked.upper()), NAMES[here.best]
    if allowed is None or NAMES.index(allowed) >= here.best:
        return None
    return f"{variable}={asked} keeps oneDNN, torch's bf16 products, from {best}; unset {variable}"


def huge_pages_off(here: Machine) -> str | None:
    if here.huge_pages != "never" or not here.on("THP_MEM_ALLOC_ENABLE"):
        return None
    return (
        "THP_MEM_ALLOC_ENABLE=1 has no effect, because the system gives no huge pages; as root: "
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    )


def interpreter(here: Machine) -> str | None:
    if not here.cuda or not here.interpreted:
        return None
    return "TRITON_INTERPRET runs Triton kernels in Python; unset TRITON_INTERPRET"


def waits_for_gpu(variable: str, effect: str, here: Machine) -> str | None:
    if not here.cuda or not here.on(variable):
        return None
    return f"{variable} {effect}; unset {variable}"


def busy(here: Machine) -> str | None:
    if not here.other_work.get("disturbed"):
        return None
    return (
        f"other work keeps {here.other_work['other_cpus']:.1f} of {here.other_work['cpus']} CPUs "
        "busy now, so that the rates above are low and other work here is slow; end it, or measure "
        "again later"
    )


SLOWER: tuple[Callable[[Machine], str | None], ...] = (
    no_cpu_kernels,
    no_gpu_kernels,
    set_not_built,
    amx_refused,
    hidden_by_hypervisor,
    threads,
    pinned,
    variable_of_no_effect,
    torch_capped,
    partial(onednn_capped, "ONEDNN_MAX_CPU_ISA"),
    partial(onednn_capped, "DNNL_MAX_CPU_ISA"),
    huge_pages_off,
    interpreter,
    partial(waits_for_gpu, "CUDA_LAUNCH_BLOCKING", "makes the host wait for every kernel"),
    partial(waits_for_gpu, "PYTORCH_NO_CUDA_MEMORY_CACHING", "asks the driver for every tensor"),
    busy,
)


def slower(here: Machine) -> list[str]:
    """Lines on what is slower than it could be."""
    return [line for check in SLOWER if (line := check(here)) is not None]


def huge_pages(here: Machine) -> str | None:
    """Huge pages for torch's large tensors, which help some programs and harm others."""
    if here.huge_pages != "madvise" or "THP_MEM_ALLOC_ENABLE" in here.environ:
        return None
    return (
        "torch's large tensors are in small pages; with THP_MEM_ALLOC_ENABLE=1 large fp32 products "
        "ran 2.2 times as fast on one server, while huge pages cost time on another whose memory "
        "was fragmented: measure with and without"
    )


def precision(here: Machine) -> str | None:
    """The settings of fp32 on AMX, each with fewer products than the one before."""
    if not any(x.name == "amx" and x.in_force for x in here.sets):
        return None
    return (
        'fp32 is exact to fp32; torch.set_float32_matmul_precision("high") makes it faster on amx, '
        "with products of 16 bits (docs/reproducibility.md)"
    )


def unneeded_interpreter(here: Machine) -> str | None:
    if here.cuda or not here.interpreted:
        return None
    return "TRITON_INTERPRET is set, which only tests need: Triton kernels run in Python"


INFORMATION: tuple[Callable[[Machine], str | None], ...] = (
    precision,
    huge_pages,
    unneeded_interpreter,
)


def information(here: Machine) -> list[str]:
    """Lines on choices that have a price."""
    return [line for check in INFORMATION if (line := check(here)) is not None]
