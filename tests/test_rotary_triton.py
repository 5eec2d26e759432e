"""The Triton kernel of rotary: in the interpreter, and as it compiles for cards not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", RUN, "interpreted_rotary.py", "-qx", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


VARIANTS = {
    "bf16": {"dtype": torch.bfloat16},
    "fp32-dim256": {"dim": 256},
    "partial-interleaved": {"dim": 80, "width": 40, "interleaved": True},
    "packed": {"dtype": torch.float16, "packed": True},
}


def compiled(card, dtype=torch.float32, dim=64, width=None, interleaved=False, packed=False):
    from clinattn.kernel_report import captured_launches, compile_for
    from clinattn.kernels.rotary import rotary

    q, k = torch.zeros(2, *((128, 8, dim) if packed else (2, 8, 128, dim)), dtype=dtype)
    frequencies = torch.ones((width or dim) // 2)
    with captured_launches(card) as launches:
        rotary(q, k, torch.zeros(128), frequencies, interleaved, False)
    ((kernel, keywords),) = launches
    assert len(keywords["grid"]) == 1
    return compile_for(kernel, keywords, card)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels that are interpreted do not compile"
)
@pytest.mark.parametrize("card", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles(variant, card):
    from clinattn.kernel_report import resource_usage

    result = compiled(card, **VARIANTS[variant])
    # What the hardware's own sine and cosine give for large angles is wrong.
    assert "sin.approx" not in result.asm["ptx"] and "cos.approx" not in result.asm["ptx"]
    assert resource_usage(result.asm["cubin"])["LOCAL"] == 0  # no spills
    if not VARIANTS[variant].get("interleaved"):
        assert "ld.global.v4" in result.asm["ptx"] and "st.global.v4" in result.asm["ptx"]
