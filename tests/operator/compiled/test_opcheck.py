"""torch.library.opcheck: schemas, fakes and autograd of the ops, under torch's own compiler."""

import pytest
import torch
from op_arguments import VARIANTS, featured_args, forward_args
from support import BACKENDS

import clinattn  # noqa: F401  it defines the ops

FORWARD = torch.ops.clinattn.attention_forward
BACKWARD = torch.ops.clinattn.attention_backward
DOUBLE_BACKWARD = torch.ops.clinattn.attention_double_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_features(backend, dtype):
    args = featured_args(dtype=dtype)
    torch.library.opcheck(FORWARD.default, (*args, backend))
    o, lse, low = FORWARD(*args, backend)
    grads = (torch.randn_like(o), torch.randn_like(lse), o, lse, low)
    for needs in (0, 5, 15):
        torch.library.opcheck(BACKWARD.default, (*grads, *args, needs, backend))
    results = BACKWARD(*grads, *args, 10, backend)
    assert [x.numel() > 0 for x in results] == [True, True, True, False, True, False, True]
    if backend == "cpu":
        torch.library.opcheck(torch.ops.clinattn.cpu_forward.default, args)
        torch.library.opcheck(torch.ops.clinattn.cpu_backward.default, (*grads, *args, 15))
    seconds = [torch.randn_like(x) for x in BACKWARD(*grads, *args, 15, backend)]
    more = (*seconds, *grads[:2], lse, low, *args, 15)
    torch.library.opcheck(DOUBLE_BACKWARD.default, more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant, backend):
    args = forward_args(**VARIANTS[variant])
    torch.library.opcheck(FORWARD.default, (*args, backend))
    o, lse, low = FORWARD(*args, backend)
    grads = (torch.randn_like(o), torch.randn_like(lse), o, lse, low)
    torch.library.opcheck(BACKWARD.default, (*grads, *args, 0, backend))
    torch.library.opcheck(BACKWARD.default, (grads[0], None, o, lse, None, *args, 0, backend))
    if backend == "cpu":
        torch.library.opcheck(torch.ops.clinattn.cpu_forward.default, args)
        torch.library.opcheck(torch.ops.clinattn.cpu_backward.default, (*grads, *args, 0))
    seconds = [torch.randn_like(x) for x in args[:3]]
    more = (*seconds, *(None,) * 4, *grads[:2], lse, low, *args, 0)
    torch.library.opcheck(DOUBLE_BACKWARD.default, more)
