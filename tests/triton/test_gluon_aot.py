"""The Gluon forward as compiled for Hopper: few registers, products that overlap softmax."""

import re
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="Triton without Gluon")

from ptx_arithmetic import Arithmetic  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from clinattn.backends.call import Arguments  # noqa: E402
from clinattn.kernels import forward, forward_gluon  # noqa: E402
from clinattn.tools.compiled.kernel_report import (  # noqa: E402
    captured_launches,
    compile_for,
    inspect,
    resource_usage,
)


def compiled(dim, dtype, causal, variant):
    """Returns (compiled kernel, its machine code as instructions with operands)"""
    schedule = forward_gluon.SCHEDULES[dim]._replace(**forward_gluon.VARIANTS.get(variant, {}))
    x = torch.zeros(2, 4, 256, dim, dtype=dtype)
    call = Arguments(x, x, x, scale=0.1, window_right=0 if causal else -1)
    with captured_launches(90) as launches:
        forward_gluon.attention_forward_gluon(call, schedule)
    ((kernel, keywords),) = launches
    del keywords["grid"]
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    keywords.setdefault("debug", False)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, keywords, *bind(**keywords)
    )
    source = GluonASTSource(kernel, signature, constexprs, attributes)
    result = triton.compile(source, target=target, options=options.__dict__)
    text = inspect("nvdisasm", "-c", cubin=result.asm["cubin"])
    return result, re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", text)


@pytest.mark.parametrize(
    "dim, dtype, causal, variant",
    [
        (128, torch.bfloat16, False, "shipped"),
        (128, torch.float16, True, "turns"),
        (64, torch.float16, False, "shipped"),
        (64, torch.bfloat16, True, "shipped"),
        (64, torch.bfloat16, True, "two-consumers"),
    ],
    ids=str,
)
def test_hopper(dim, dtype, causal, variant):
    kernel, code = compiled(dim, dtype, causal, variant)
    usage = resource_usage(kernel.asm["cubin"])
    consumers = 2 if variant == "two-consumers" else forward_gluon.SCHEDULES[dim].consumers
    assert usage["LOCAL"] == 0
    assert usage["STACK"] <= (0 if consumers == 2 else 224)  # see SCHEDULES
    assert kernel.metadata.shared <= 232_448
    steps = [at for at, x in enumerate(code) if x.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x1")]
    assert len(steps) == consumers
    for step in steps:
        # Between q k^T and p v: all exponentials of a tile, 64 x 128 by 128 threads, and of alpha.
        last = next(i for i in range(step + 1, len(code)) if code[i].startswith("WARPGROUP.DEPBAR"))
        assert sum(x.startswith("MUFU.EX2") for x in code[step:last]) == 66
        # Before it one product of each kind was issued, and none was waited for.
        products = [x for x in code[:step] if x.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]
        issued = products[-(dim // 16 + 8) :]
        assert all(x.startswith("HGMMA") for x in issued)
        assert sum("gsb0" in x for x in issued) == 2


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_the_other_kernel(dtype, causal):
    """Both kernels compute the same expressions of two tiles of scores, whatever serves a call."""
    kernel, _ = compiled(128, dtype, causal, "shipped")
    x = torch.zeros(2, 4, 256, 128, dtype=dtype)
    call = Arguments(x, x, x, scale=0.1, window_right=0 if causal else -1)
    never = mock.patch.object(forward, "gains_by_gluon", lambda problem: False)
    with never, captured_launches(90) as launches:
        forward.attention_forward(call)
    other = compile_for(*launches[0], 90)
    arithmetic = Arithmetic()
    ((o, lse),) = arithmetic.results(other.asm["ptx"])
    assert len(o) == 32 and len(lse) == 2  # of a thread: two rows, two columns of o in a register
    groups = arithmetic.results(kernel.asm["ptx"])
    assert len(groups) == forward_gluon.SCHEDULES[128].consumers
    assert all(group == (o, lse) for group in groups)
