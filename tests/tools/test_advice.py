"""Advice of doctor: each check on a stand-in for a machine, with the fault and without."""

from dataclasses import replace
from functools import partial

import pytest

from clinattn.tools import advice
from clinattn.tools.advice import INFORMATION, SLOWER, Machine, information, slower
from clinattn.tools.cpus import Cpus
from clinattn.tools.instruction_sets import FLAGS, NAMES, InstructionSet


def sets(best, built=NAMES, reasons=None, lacking=()):
    """The table where the sets up to `best` are usable, and those after it are not."""
    usable = NAMES[: NAMES.index(best) + 1]
    return tuple(
        InstructionSet(
            name,
            name in built,
            name in usable,
            name == best,
            None if name in usable else (reasons or {}).get(name, "because"),
            () if name in usable else lacking,
        )
        for name in NAMES
    )


# A machine on which nothing is to be mended.
FINE = Machine(
    environ={"PATH": "/bin"},
    threads=4,
    cpus=Cpus(allowed=4, cores=4, quota=None),
    sets=sets("avx512_bf16", lacking=FLAGS["amx"]),
    flags=frozenset(x for name in NAMES[:-1] for x in FLAGS[name]),
    huge_pages="always",
    other_work={"disturbed": False, "other_cpus": 0.1, "cpus": 4},
    against={"triton": ["no GPU"], "cuda": ["no GPU"], "cpu": [], "reference": []},
    interpreted=False,
    cuda=False,
)
WITH_AMX = FINE.flags | set(FLAGS["amx"])
GPU = {"cuda": True, "against": {**FINE.against, "triton": [], "cuda": []}}


def variables(**environ):
    return {"environ": environ}


# (changes to FINE, words of the line)
SLOW = {
    "no kernels": (
        {"against": {**FINE.against, "cpu": ["not built"]}, "sets": ()},
        "CPU tensors take the slow reference; build the CPU kernels: make ext",
    ),
    "an old card": (
        {"cuda": True, "against": {**FINE.against, "triton": ["capability 7.0"], "cuda": []}},
        "no Triton kernels on this GPU: capability 7.0",
    ),
    "a set not built": (
        {"sets": sets("avx512_bf16", NAMES[:-1]), "flags": WITH_AMX},
        "the processor has amx, for which this build has no kernels; build with a newer compiler",
    ),
    "amx refused": (
        {"sets": sets("avx512_bf16", reasons={"amx": "the kernel refuses"}), "flags": WITH_AMX},
        "amx, the fastest set, is out of use: the kernel refuses; let the container",
    ),
    "an old model of a processor": (
        {"sets": sets("scalar", lacking=("avx2",)), "flags": frozenset({"sse2", "hypervisor"})},
        'hides avx2 and what came after; ask its administrator for the processor type "host"',
    ),
    "more threads than the quota": (
        {"cpus": Cpus(4, 4, 2.5)},
        "torch has 4 threads, and its control group the time of 2.5 CPUs (cpu.max): all threads "
        "are stopped when that is used up; set OMP_NUM_THREADS=2, or call torch.set_num_threads(2)",
    ),
    "more threads than CPUs": (
        {"cpus": Cpus(1, 1, None)},
        "torch has 4 threads on 1 CPU; set OMP_NUM_THREADS=1,",
    ),
    "hyperthreads": (
        {"cpus": Cpus(4, 2, None)},
        "torch has 4 threads on 2 cores, and two on one core share its units; "
        "set OMP_NUM_THREADS=2,",
    ),
    "few threads": (
        {"threads": 1, **variables(OMP_NUM_THREADS="1")},
        "torch has 1 thread, and 4 would have a core each; set OMP_NUM_THREADS=4, or call "
        "torch.set_num_threads(4), unless other work needs the rest",
    ),
    "few threads by MKL": (
        {"threads": 2, **variables(MKL_NUM_THREADS="2")},
        "set MKL_NUM_THREADS=4,",
    ),
    "a bound thread": (
        {"cpus": Cpus(1, 1, None), **variables(OMP_PROC_BIND="close")},
        "OMP_PROC_BIND=close binds the first thread to one CPU",
    ),
    "a bound thread of GOMP": (
        {"cpus": Cpus(1, 1, None), **variables(GOMP_CPU_AFFINITY="0-3")},
        "unset GOMP_CPU_AFFINITY, or call os.sched_setaffinity",
    ),
    "a variable that torch does not read": (
        variables(TORCH_NUM_THREADS="2"),
        "TORCH_NUM_THREADS=2 has no effect: torch does not read it; OMP_NUM_THREADS=2 sets",
    ),
    "torch on avx2": (
        variables(ATEN_CPU_CAPABILITY="avx2"),
        "ATEN_CPU_CAPABILITY=avx2 keeps torch's own operators from avx512; unset",
    ),
    "torch without vectors": (
        {"sets": sets("avx2"), **variables(ATEN_CPU_CAPABILITY="default")},
        "ATEN_CPU_CAPABILITY=default keeps torch's own operators from avx2; unset",
    ),
    "oneDNN below bf16": (
        variables(ONEDNN_MAX_CPU_ISA="AVX512_CORE"),
        "keeps oneDNN, torch's bf16 products, from avx512_bf16; unset ONEDNN_MAX_CPU_ISA",
    ),
    "oneDNN by its old name": (
        variables(DNNL_MAX_CPU_ISA="avx2"),
        "DNNL_MAX_CPU_ISA=avx2 keeps oneDNN",
    ),
    "oneDNN below amx": (
        {"sets": sets("amx"), **variables(ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")},
        "torch's bf16 products, from amx;",
    ),
    "huge pages that the system never gives": (
        {"huge_pages": "never", **variables(THP_MEM_ALLOC_ENABLE="1")},
        "THP_MEM_ALLOC_ENABLE=1 has no effect, because the system gives no huge pages; as root:",
    ),
    "the interpreter": (
        {**GPU, "interpreted": True},
        "TRITON_INTERPRET runs Triton kernels in Python; unset TRITON_INTERPRET",
    ),
    "blocking launches": (
        {**GPU, **variables(CUDA_LAUNCH_BLOCKING="1")},
        "CUDA_LAUNCH_BLOCKING makes the host wait for every kernel; unset CUDA_LAUNCH_BLOCKING",
    ),
    "memory of a GPU that is not kept": (
        {**GPU, **variables(PYTORCH_NO_CUDA_MEMORY_CACHING="1")},
        "PYTORCH_NO_CUDA_MEMORY_CACHING asks the driver for every tensor; unset",
    ),
    "other work": (
        {"other_work": {"disturbed": True, "other_cpus": 1.94, "cpus": 4}},
        "other work keeps 1.9 of 4 CPUs busy now",
    ),
}  # fmt: skip

# Changes to FINE that are nobody's fault.
NOT_SLOW = {
    "as it is": {},
    "amx that the processor lacks": {"sets": sets("avx512", lacking=FLAGS["amx"])},
    "amx in use": {"sets": sets("amx"), "flags": WITH_AMX},
    "a processor that tells nothing": {"sets": sets("avx512"), "flags": frozenset()},
    "an old processor itself": {
        "sets": sets("scalar", lacking=("avx2",)), "flags": frozenset({"sse2"})
    },
    "a quota as large as the threads": {"cpus": Cpus(8, 8, 4.5)},
    "one thread on half a CPU": {"threads": 1, "cpus": Cpus(4, 4, 0.5)},
    "a core of two CPUs each": {"cpus": Cpus(8, 4, None)},
    "threads that may move": {"environ": {"OMP_PROC_BIND": "false"}},
    "threads bound beside each other": {"environ": {"OMP_PROC_BIND": "true"}},
    "torch's variable as torch has it": {"environ": {"TORCH_NUM_THREADS": "4"}},
    "torch's best": {"environ": {"ATEN_CPU_CAPABILITY": "avx512"}},
    "torch's variable misspelt, which it ignores": {"environ": {"ATEN_CPU_CAPABILITY": "AVX2"}},
    "oneDNN's best": {"environ": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}},
    "all of oneDNN": {"environ": {"ONEDNN_MAX_CPU_ISA": "ALL"}},
    "no huge pages, and none asked for": {"huge_pages": "never"},
    "the interpreter, without a GPU": {"interpreted": True},
    "launches that do not block": {**GPU, "environ": {"CUDA_LAUNCH_BLOCKING": "0"}},
    "blocking launches, without a GPU": {"environ": {"CUDA_LAUNCH_BLOCKING": "1"}},
    "a GPU": GPU,
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiler_and_kernel(monkeypatch):
    monkeypatch.setattr(advice.installation, "compiler", lambda: "g++ 13")
    monkeypatch.setattr(advice.platform, "release", lambda: "6.8.0-31-generic")


@pytest.mark.parametrize("name", SLOW)
def test_what_is_slow_has_one_line_with_its_remedy(name):
    changes, words = SLOW[name]
    (line,) = slower(replace(FINE, **changes))
    assert words in line and ";" in line + ";" * name.startswith("an old card")


@pytest.mark.parametrize("name", NOT_SLOW)
def test_no_line_without_a_reason(name):
    assert slower(replace(FINE, **NOT_SLOW[name])) == []


def test_every_check_has_a_case():
    def name(check):
        return (check.func, *check.args) if isinstance(check, partial) else check

    found = [replace(FINE, **changes) for changes, _ in SLOW.values()]
    silent = [name(check) for check in SLOWER if not any(check(here) for here in found)]
    assert silent == []


def test_an_old_kernel_is_the_reason(monkeypatch):
    monkeypatch.setattr(advice.platform, "release", lambda: "5.10.0-28-amd64")
    changes, _ = SLOW["amx refused"]
    (line,) = slower(replace(FINE, **changes))
    assert line.endswith("; Linux 5.16 and later give it, and this is 5.10.0-28-amd64")


def test_no_compiler_is_named_first(monkeypatch):
    monkeypatch.setattr(advice.installation, "compiler", lambda: None)
    (line,) = slower(replace(FINE, **SLOW["no kernels"][0]))
    assert "install a C++ compiler (Debian: apt install g++), then: make ext" in line


NOTES = {
    "amx": ({"sets": sets("amx")}, 'set_float32_matmul_precision("high") makes it faster on amx'),
    "huge pages": ({"huge_pages": "madvise"}, "THP_MEM_ALLOC_ENABLE=1"),
    "the interpreter": ({"interpreted": True}, "which only tests need"),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_choice_with_a_price_is_information(name):
    changes, words = NOTES[name]
    (line,) = information(replace(FINE, **changes))
    assert words in line and slower(replace(FINE, **changes)) == []


def test_no_information_where_nothing_is_to_be_chosen():
    decided = variables(THP_MEM_ALLOC_ENABLE="0")
    for changes in ({}, {"huge_pages": None}, {"huge_pages": "madvise", **decided}):
        assert information(replace(FINE, **changes)) == []
    assert len(INFORMATION) == len(NOTES)
