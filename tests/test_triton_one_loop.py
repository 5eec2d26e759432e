"""The kernels of one loop: results in Triton's interpreter, and what they compile to for Hopper."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from clinattn.arguments import Arguments  # noqa: E402
from clinattn.kernel_report import (  # noqa: E402
    CARDS,
    captured_launches,
    compile_for,
    inspect,
    resource_usage,
)
from clinattn.kernels.backward_one_loop import DQ_TILES, dkdv_one_loop, dq_one_loop  # noqa: E402
from clinattn.kernels.forward_one_loop import (  # noqa: E402
    TILES,
    TMA_TILES,
    attention_forward_one_loop,
)

RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
BOUNDS = {
    "full": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 64, "window_right": 64},
}


def test_in_the_interpreter():
    """interpreted_one_loop.py, in a process of its own: see interpreted_triton.py."""
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "interpreted_one_loop.py", *options],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def call_of(dim, bounds, packed=False, n=250, heads=(4, 2)):
    q, k = (torch.zeros((n, h, dim) if packed else (2, h, n, dim)).bfloat16() for h in heads)
    cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
    return Arguments(
        q, k, k, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, scale=0.1, **BOUNDS[bounds]
    )


def compiled(launch):
    """(the last kernel that is launched, as compiled for Hopper, its resources, machine code)"""
    with captured_launches(90) as launches:
        launch()
    kernel = compile_for(*launches[-1], 90)
    cubin = kernel.asm["cubin"]
    return kernel, resource_usage(cubin), inspect("nvdisasm", "-c", cubin=cubin)


def check_roles(launch, roles=True):
    """Nothing spills, tiles come by TMA, and where warps have roles they deal out registers."""
    kernel, usage, sass = compiled(launch)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert kernel.metadata.shared <= CARDS[90].block_shared
    assert "UTMALDG" in sass and "HGMMA" in sass
    assert ("USETMAXREG" in sass) == roles


CASES = [(dim, tile, "causal", False) for dim in (64, 128) for tile in TILES[dim]]
CASES += [(dim, TILES[dim][0], bounds, False) for dim in (64, 128) for bounds in ("full", "window")]
CASES += [(dim, TILES[dim][0], "causal", True) for dim in (64, 128)]


@pytest.mark.parametrize(("dim", "tile", "bounds", "packed"), CASES, ids=str)
def test_forward(dim, tile, bounds, packed):
    call = call_of(dim, bounds, packed)
    check_roles(lambda: attention_forward_one_loop(call, tile))


@pytest.mark.parametrize("dim", TMA_TILES)
def test_forward_without_roles(dim):
    call = call_of(dim, "causal")
    for tile in TMA_TILES[dim]:
        check_roles(lambda t=tile: attention_forward_one_loop(call, t, False), roles=False)


@pytest.mark.parametrize("bounds", ["full", "causal"])
@pytest.mark.parametrize("dim", DQ_TILES)
def test_backward(dim, bounds):
    call = call_of(dim, bounds, heads=(4, 4))
    sums = (torch.zeros(2, 4, 252),) * 2
    check_roles(lambda: dq_one_loop(call.q, sums, call))
    check_roles(lambda: dkdv_one_loop(call.q, sums, call))
