"""Calls of the compiled backend against the reference, in a Python that has torch alone.

    path/to/python tests/lib/one_library.py

Run from anywhere, with the root of the repository on PYTHONPATH. Prints the versions and how many
calls agree.
"""

from __future__ import annotations

import platform

import torch

import clinattn
import clinattn.encoder.linear  # noqa: F401  it defines an op
from clinattn import _C

ENDS = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
TIMES = torch.arange(40.0).expand(2, 40)
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (7, 2)},
    "boolean mask": {"attn_mask": torch.rand(2, 1, 1, 40) < 0.7},
    "bias": {"attn_mask": torch.randn(1, 2, 40, 40, requires_grad=True)},
    "times": {"times": TIMES, "time_decay": torch.rand(2, requires_grad=True)},
    "slopes": {"alibi_slopes": torch.rand(2, requires_grad=True)},
    "relative": {"relative_bias": torch.randn(2, 11, requires_grad=True)},
    "softcap": {"softcap": 2.0},
    "prefix": {"is_causal": True, "global_prefix": 3},
    "dropout": {"dropout_p": 0.3},
    "packed": {"cu_seqlens_q": ENDS},
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float64: 1e-11}


def results(keywords: dict, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """The output, and the gradients of all that has one."""
    torch.manual_seed(0)
    packed = "cu_seqlens_q" in keywords
    shape = (40, 2, 24) if packed else (2, 2, 40, 24)
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]
    function = clinattn.fused_attention_varlen if packed else clinattn.fused_attention
    out = function(*inputs, **keywords, backend=backend)
    leaves = [*inputs, *(x for x in keywords.values() if getattr(x, "requires_grad", False))]
    return [out, *torch.autograd.grad(out, leaves, torch.cos(out.detach().float()).to(dtype))]


def main() -> None:
    assert clinattn.backends()["cpu"], clinattn.backends()
    agreed = 0
    for name, keywords in CALLS.items():
        for dtype, tolerance in TOLERANCE.items():
            both = [results(keywords, dtype, backend) for backend in ("cpu", "reference")]
            for ours, theirs in zip(*both, strict=True):
                bound = tolerance * max(1.0, theirs.abs().max().item())
                error = (ours.double() - theirs.double()).abs().max().item()
                assert error <= bound, f"{name}, {dtype}: off by {error}, at most {bound} expected"
            agreed += 1
    _C.set_instruction_set("scalar")
    assert _C.instruction_set() == "scalar"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}: {agreed} of {len(CALLS) * len(TOLERANCE)} calls agree")


if __name__ == "__main__":
    main()
