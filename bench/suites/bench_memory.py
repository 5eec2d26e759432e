"""Peak memory of attention by length: ours grows with N, and plain maths with N squared.

    pytest bench/suites/bench_memory.py --benchmark-only --sizes large

A peak is what one call needs above its inputs: the allocator's on CUDA, else the resident set's,
which Linux lets a process reset.
"""

from __future__ import annotations

import functools

import pytest
import torch

from clinattn.tools.benchmark.measure import peak_memory
from suites.peers import WAYS, Eager
from suites.problem import AttentionCase, Sdpa, check, cotangent, inputs

LENGTHS = {"small": (512, 1024, 2048, 4096), "large": (1024, 2048, 4096, 8192, 16384)}
SHOWN = ("clinattn", "sdpa", "eager")
PASSES = ("forward", "forward_backward")
DTYPE, HEADS, HEAD_DIM, CHECKED_LENGTH = torch.float32, 2, 64, 512
# Most growth at four times the length: four, and what the C library rounds blocks up by.
MOST_OF_LINEAR = 6.0
NOISE_BYTES = 4 << 20  # pages that the C library keeps, and stacks


def make(way: str, device: torch.device):
    if way != "clinattn":
        return WAYS[way]
    return WAYS["clinattn-cpu" if device.type == "cpu" else "clinattn-triton"]


@functools.cache
def peak(way: str, passes: str, length: int, device: torch.device) -> int:
    """Bytes above q, k, v; the first call, which starts threads and libraries, is not counted."""
    case = AttentionCase((length,), HEADS, HEAD_DIM)
    qkv = inputs(case, DTYPE, device)
    solved = make(way, device)(case, qkv)
    d_out = solved.laid_out(cotangent(qkv[0]))

    def work() -> None:
        if passes == "forward":
            with torch.no_grad():
                solved.forward()
        else:
            torch.autograd.grad(solved.forward(), solved.inputs, d_out)

    work()
    found = peak_memory(work, device)
    if found is None:
        pytest.skip("the peak of this process cannot be read here")
    return found


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("way", SHOWN)
def test_memory(benchmark, device, sizes, way, passes):
    """Times the longest, and notes the peak of every length."""
    case = AttentionCase((CHECKED_LENGTH,), HEADS, HEAD_DIM)
    naive = Sdpa if way == "clinattn" else Eager
    check(case, DTYPE, device, [make(way, device)], HEADS, naive=naive)
    benchmark.group = f"memory {passes}"
    lengths = LENGTHS[sizes]
    peaks = {length: peak(way, passes, length, device) for length in lengths}
    benchmark.extra_info |= {
        "kind": "memory",
        "way": way,
        "passes": passes,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "peak_bytes": peaks,
    }
    case = AttentionCase((lengths[-1],), HEADS, HEAD_DIM)
    solved = make(way, device)(case, inputs(case, DTYPE, device))
    benchmark.pedantic(torch.no_grad()(solved.forward), rounds=3)


@pytest.mark.parametrize("passes", PASSES)
def test_ours_grows_with_the_length(benchmark, device, sizes, passes):
    """Checks that our peak grows linearly; plain maths shows that the measure sees squares."""
    longest = LENGTHS[sizes][-1]
    benchmark.group = f"memory {passes}"
    ours, eager = (
        [peak(way, passes, n, device) for n in (longest // 4, longest)]
        for way in ("clinattn", "eager")
    )
    assert ours[1] <= MOST_OF_LINEAR * ours[0] + NOISE_BYTES
    scores = HEADS * longest**2 * DTYPE.itemsize
    assert ours[1] < scores / 4 and eager[1] >= scores
    benchmark.extra_info |= {"kind": "growth", "clinattn": ours, "eager": eager}
    benchmark.pedantic(lambda: None, rounds=1)
