"""The Triton kernel of rotary as it compiles for cards that need not be here."""

import pytest
import torch

pytest.importorskip("triton")

VARIANTS = {
    "bf16": {"dtype": torch.bfloat16},
    "fp32-dim256": {"dim": 256},
    "partial-interleaved": {"dim": 80, "width": 40, "interleaved": True},
    "packed": {"dtype": torch.float16, "packed": True},
}


def compiled(card, dtype=torch.float32, dim=64, width=None, interleaved=False, packed=False):
    from clinattn.kernels.rotary import rotary
    from clinattn.tools.compiled.kernel_report import captured_launches, compile_for

    q, k = torch.zeros(2, *((128, 8, dim) if packed else (2, 8, 128, dim)), dtype=dtype)
    frequencies = torch.ones((width or dim) // 2)
    with captured_launches(card) as launches:
        rotary(q, k, torch.zeros(128), frequencies, interleaved, False)
    ((kernel, keywords),) = launches
    assert len(keywords["grid"]) == 1
    return compile_for(kernel, keywords, card)


@pytest.mark.parametrize("card", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles(variant, card):
    from clinattn.tools.compiled.kernel_report import resource_usage

    result = compiled(card, **VARIANTS[variant])
    # The hardware's own sine and cosine are wrong for large angles.
    assert "sin.approx" not in result.asm["ptx"] and "cos.approx" not in result.asm["ptx"]
    assert resource_usage(result.asm["cubin"])["LOCAL"] == 0  # no spills
    if not VARIANTS[variant].get("interleaved"):
        assert "ld.global.v4" in result.asm["ptx"] and "st.global.v4" in result.asm["ptx"]
