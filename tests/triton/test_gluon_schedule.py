"""The Gluon forward, run on the CPU by emulated_gluon.py: its schedule, its tiles and its masks."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="Triton without Gluon")

from emulated_gluon import Barrier, emulated  # noqa: E402
from support import assert_close  # noqa: E402

from clinattn.backends.call import Arguments  # noqa: E402
from clinattn.kernels import forward_gluon, forward_gluon_kernel  # noqa: E402

# (head dim, heads, key heads, queries, keys, causal, bottom_right)
CASES = {
    "one-key": (64, 1, 1, 3, 1, False, False),
    "odd": (128, 1, 1, 113, 300, False, False),
    "whole-tiles": (64, 1, 1, 192, 512, False, False),
    "causal": (128, 2, 1, 300, 300, True, False),
    "causal-three-consumers": (64, 1, 1, 500, 500, True, False),
    "causal-keys-longer": (128, 1, 1, 70, 700, True, True),
    "causal-no-keys": (128, 1, 1, 400, 130, True, True),
    "causal-keys-shorter": (64, 1, 1, 300, 100, True, False),
    "grouped": (64, 4, 2, 65, 129, False, False),
}


def plain(call, causal, dtype):
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = call.scale * q @ k.mT
    if causal:
        offset = k.shape[2] - q.shape[2] if call.bottom_right else 0
        i, j = (torch.arange(x.shape[2]) for x in (q, k))
        s = s.masked_fill(j > i[:, None] + offset, float("-inf"))
    lse = s.logsumexp(-1)
    return torch.exp(s - lse[..., None].nan_to_num(neginf=0.0)) @ v, lse


@pytest.mark.parametrize("variant", ["shipped", *forward_gluon.VARIANTS])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case, variant, monkeypatch):
    dim, heads, key_heads, num_q, num_k, causal, bottom_right = case
    schedule = forward_gluon.SCHEDULES[dim]._replace(**forward_gluon.VARIANTS.get(variant, {}))
    monkeypatch.setattr(forward_gluon, "multiprocessors", lambda device: 2)
    q = torch.randn(2, heads, num_q, dim).bfloat16()
    # As in a fused projection: rows of a head are not neighbours.
    kv = torch.randn(2, num_k, 2 * key_heads, dim).bfloat16().transpose(1, 2)
    k, v = kv.chunk(2, 1)
    right = 0 if causal else -1
    call = Arguments(q, k, v, scale=-0.3, window_right=right, bottom_right=bottom_right)
    with emulated():
        o, lse = forward_gluon.attention_forward_gluon(call, schedule)
    (o_true, lse_true), (naive, _) = (
        plain(call, causal, dtype) for dtype in (torch.float64, q.dtype)
    )
    assert_close("o", o, o_true, naive)
    sees = lse_true.isfinite()
    assert torch.equal(lse.isneginf(), ~sees)
    units = 4 * torch.finfo(torch.float32).eps * lse_true[sees].abs().max().clamp(min=1)
    assert (lse[sees] - lse_true[sees]).abs().max() <= units


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_rows_of_large_scores_are_left(dtype, causal, monkeypatch):
    """Rows of large scores are marked NaN in lse; the rows beside them keep their results."""
    monkeypatch.setattr(forward_gluon, "multiprocessors", lambda device: 2)
    q, k, v = (torch.randn(1, 1, n, 128) for n in (200, 300, 300))
    # By turns rows have large scores, scores that are large and negative before the last 20 keys,
    # and neither.
    kinds = torch.arange(200) % 3
    q[..., 0], k[..., 0] = kinds - 1, 0
    k[..., :180, 0] = 6e4
    q, k, v = (x.to(dtype) for x in (q, k, v))
    call = Arguments(q, k, v, scale=0.1, window_right=0 if causal else -1, bottom_right=causal)
    o_true, lse_true = plain(call, causal, torch.float64)
    with emulated():
        o, lse = forward_gluon.attention_forward_gluon(call)
    left = lse_true.abs() > 4000
    assert left.any() and not left.all()
    assert torch.equal(lse.isnan(), left)
    naive, _ = plain(call, causal, torch.float32)
    assert_close("o", o[~left], o_true[~left], naive[~left].to(dtype))
    assert ((lse - lse_true)[~left].abs() < 1e-2).all()


def test_a_schedule_that_hangs_is_seen(monkeypatch):
    monkeypatch.setattr("emulated_gluon.PATIENCE", 0.2)
    barrier = Barrier()
    barrier.init(2)
    barrier.arrive()
    barrier.wait(1)  # as if the phase before had been completed
    with pytest.raises(AssertionError, match="deadlock"):
        barrier.wait(0)


@pytest.mark.parametrize("fault", ["early", "unready"])
def test_a_faulty_schedule_is_seen(fault, monkeypatch):
    """Nobody waits for slots to be free, or nobody waits for tiles to arrive."""
    monkeypatch.setattr("emulated_gluon.PATIENCE", 1.0)
    q, k, v = (torch.randn(1, 1, 1000, 128).bfloat16() for _ in range(3))
    with emulated():
        wait = forward_gluon_kernel.mbarrier.wait
        ignored = lambda barrier: (barrier.count > 1) == (fault == "early")
        monkeypatch.setattr(
            forward_gluon_kernel.mbarrier,
            "wait",
            lambda barrier, parity: None if ignored(barrier) else wait(barrier, parity),
        )
        with pytest.raises(AssertionError):
            o, _ = forward_gluon.attention_forward_gluon(Arguments(q, k, v, scale=0.1))
            assert torch.isfinite(o).all()
