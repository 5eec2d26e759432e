"""Segments and timestamps: exact intervals, and what is said of values out of order."""

import pytest
import torch
from pairwise import pairwise

from clinattn import fused_attention, fused_attention_varlen
from clinattn.operator import timeline

RANDOM = torch.Generator().manual_seed(3)


def irregular(n, dtype=torch.float64):
    """Sorted times with ties, whose differences lie right at the bound or a rounding beside it."""
    steps = torch.randint(0, 7, (n,), generator=RANDOM).double() * 0.1
    return (steps.cumsum(0) + 5e7).to(dtype)


def brute_force(t, window):
    """(lo, hi) of one sequence from the mask of all pairs."""
    since = (t - t[0]).float()
    near = (since[:, None] - since).abs() <= torch.tensor(window, dtype=torch.float32)
    place = torch.arange(len(t))
    lo = torch.where(near, place, len(t)).amin(1)
    hi = torch.where(near, place + 1, 0).amax(1)
    assert torch.equal(near, (place >= lo[:, None]) & (place < hi[:, None]))
    return lo.int(), hi.int()


SIZES = [1, 2, 7, 8, 9, 200]
LENGTHS = [0.0, 0.1, 0.3, 2.0, 1e9, float("inf")]
TYPES = [torch.float32, torch.float64, torch.int64]


@pytest.mark.parametrize("n, window, dtype", pairwise(SIZES, LENGTHS, TYPES))
def test_time_windows_are_exact(n, window, dtype):
    t = torch.stack([irregular(n, dtype) for _ in range(3)])
    rows = timeline.dense_rows(t, None)
    since = timeline.shifted_times(t, rows, rows.first, torch.float64)
    lo, hi = timeline.window_intervals(since, rows, window)
    assert lo.dtype == hi.dtype == torch.int32
    for b in range(3):
        expected_lo, expected_hi = brute_force(t[b], window)
        assert torch.equal(lo[b], expected_lo) and torch.equal(hi[b], expected_hi)


@pytest.mark.parametrize("bound", [0, 10], ids=["tight", "loose"])
def test_packed_sequences_do_not_mix(bound):
    lengths = [5, 0, 40, 1, 0, 17]
    parts = [irregular(n) - 1000 * i for i, n in enumerate(lengths)]
    t = torch.cat([*parts, torch.full((4,), torch.nan).double()])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = timeline.packed_rows(t, cu_seqlens, 40 + bound)
    since = timeline.shifted_times(t, rows, rows.first, torch.float32)
    lo, hi = timeline.window_intervals(since, rows, 0.5)
    expected = [brute_force(x, 0.5) for x in parts if len(x)]
    assert torch.equal(lo[:-4], torch.cat([x for x, _ in expected]))
    assert torch.equal(hi[:-4], torch.cat([x for _, x in expected]))
    assert torch.equal(lo[-4:], hi[-4:])


def test_late_timestamps_keep_their_steps():
    """Ten seconds at 5e7 minutes, which fp32 would round to whole spans of 4 minutes."""
    t = 5e7 + torch.arange(6).double()[None] / 6
    q = torch.randn(1, 1, 6, 8)
    for times, window in ((t, 0.17), ((t * 60).round().long(), 10)):
        o = fused_attention(q, q, q, times=times, time_window=window, backend="reference")
        expected = fused_attention(q, q, q, window=1, backend="reference")
        torch.testing.assert_close(o, expected)


def test_left_padding_of_zeros_costs_no_precision():
    """The origin is the time of the first key that counts, not that of the padding before it."""
    q = torch.randn(1, 2, 9, 8)
    times = torch.cat([torch.zeros(3), 5e7 + torch.arange(6).double() / 6]).double()[None]
    keys = torch.arange(9) >= 3
    words = {"time_window": 0.17, "time_decay": torch.rand(2), "backend": "reference"}
    padded = fused_attention(q, q, q, keys, times=times, **words)
    alone = fused_attention(*[q[:, :, 3:]] * 3, times=times[:, 3:], **words)
    torch.testing.assert_close(padded[:, :, 3:], alone)


def test_equal_times_decay_by_exactly_nothing():
    q = torch.randn(1, 2, 33, 8)
    keywords = {"times": torch.full((1, 33), 1.1e7), "time_decay": torch.tensor([3e38, 0.0])}
    o = fused_attention(q, q, q, backend="reference", **keywords)
    assert torch.equal(o, fused_attention(q, q, q, backend="reference"))


def test_intervals_never_decrease_even_where_padding_is_garbage():
    t = torch.stack([irregular(50), irregular(50)])
    lengths = torch.tensor([50, 13])
    t[1, 13:] = torch.nan
    rows = timeline.dense_rows(t, lengths)
    since = timeline.shifted_times(t, rows, rows.first, torch.float32)
    assert since.isfinite().all()
    for x in timeline.window_intervals(since, rows, 0.5):
        assert (x.diff(dim=-1) >= 0).all()
    ids = torch.randint(-5, 5, (2, 50), generator=RANDOM)
    ids[:, :13] = ids[:, :13].sort(1)[0]
    ids[0] = ids[0].sort()[0]
    for x in timeline.segment_intervals(ids, rows):
        assert (x.diff(dim=-1) >= 0).all() and (x <= 50).all()


def test_segments_of_extreme_ids():
    ids = torch.tensor([[-(2**63), -(2**63), 0, 2**63 - 1, 2**63 - 1, 7]])
    lo, hi = timeline.segment_intervals(ids, timeline.dense_rows(ids, torch.tensor([5])))
    assert lo.tolist() == [[0, 0, 2, 3, 3, 5]] and hi.tolist() == [[2, 2, 3, 5, 5, 5]]


Q = torch.randn(2, 1, 6, 8)
SORTED = torch.arange(6).expand(2, 6).clone()


def spoilt(at, value, dtype=torch.float64):
    x = SORTED.to(dtype)
    x[1, at] = value
    return x


@pytest.mark.parametrize(
    "keywords, match",
    [
        ({"segment_ids": spoilt(3, 0, torch.int32)}, "segment_ids: row 1 decreases at 3, from 2 t"),
        ({"times": spoilt(5, -1.0)}, "times: row 1 decreases at 5, from 4.0 to -1.0; expected no"),
        ({"times": spoilt(2, torch.nan)}, "times: row 1 is nan at 2, expected finite"),
        ({"times": spoilt(5, torch.inf)}, "times: row 1 is inf at 5, expected finite"),
        ({"times": spoilt(1, -5, torch.int64)}, "times: row 1 decreases at 1, from 0 to -5"),
    ],
    ids=["segments", "times", "nan", "inf", "int64"],
)
def test_disorder_is_named(keywords, match):
    if "times" in keywords:
        keywords["time_window"] = 1.0
    with pytest.raises(ValueError, match=match):
        fused_attention(Q, Q, Q, **keywords)
    lengths = torch.tensor([6, 1])
    lengths = {"q_lengths": lengths, "kv_lengths": lengths}
    fused_attention(Q, Q, Q, backend="reference", **lengths, **keywords)


def test_disorder_in_a_packed_sequence_is_named():
    q = torch.randn(9, 1, 8)
    cu_seqlens = torch.tensor([0, 4, 4, 8]).int()
    times = torch.tensor([4.0, 5, 6, 7, 0, 1, 3, 2, torch.nan])
    with pytest.raises(ValueError, match="times: sequence 2 decreases at 3, from 3.0 to 2.0"):
        fused_attention_varlen(
            q, q, q, cu_seqlens, times=times, time_window=1.0, backend="reference"
        )
    times[7] = 3
    fused_attention_varlen(q, q, q, cu_seqlens, times=times, time_window=1.0, backend="reference")
