"""No two warps of a block of the CUDA kernels touch the same bytes without a barrier between."""

import subprocess

import pytest
import torch
from building import toolchain
from places import ROOT
from races import FLAGS, at_fixed_addresses, missing, races
from support import dtype_id

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

GROUPS = {
    "plain": "one-query dim1 dim128 causal strides-reversed logits-1e4",
    "windows": "window lengths-causal lengths-gqa causal-keys-longer prefix-gqa-long segments",
    "masks": "mask-bool-bhqk mask-float-bhqk mask-float-b11k mask-left-padding-window",
    "packed": "packed packed-cross-causal packed-window packed-tail packed-lse-only dropout-packed",
    "added": "mask-grad-qk decay alibi-packed relative relative-packed softcap",
    "everything": "dim256 everything everything-packed",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("group", GROUPS)
def test_no_races_between_warps(group, capability, dtype):
    assert races(GROUPS[group].split(), dtype, capability) == []


def test_a_missing_barrier_is_seen_in_any_order(tmp_path):
    """Also in the one in which the emulator gives the right results."""
    program = tmp_path / "words"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/lib/csrc'}"]
    source = ROOT / "tests/lib/csrc/emulated_words.cpp"
    command = [*toolchain.compiler(), "-std=c++20", *FLAGS, *folders, str(source)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    def seen(name):
        return subprocess.run(at_fixed_addresses([str(program), name]), capture_output=True)

    assert seen("hand_over").stderr == b""
    assert b"data race" in seen("hand_over_unsynchronized").stderr
