"""Arguments of the ops clinattn::attention_forward and attention_backward, in their order."""

import torch

LENGTHS = torch.tensor([5, 2], dtype=torch.int32)
VARIANTS = {
    "dense": {},
    "gqa": {"kv_heads": 1},
    "mask": {"mask": torch.rand(2, 1, 1, 7) < 0.7, "kv_end": LENGTHS},
    "lengths": {"q_lengths": LENGTHS, "kv_end": LENGTHS, "window_left": 2},
    "bf16": {"dtype": torch.bfloat16},
    "fp64": {"dtype": torch.float64},
    "packed": {"cu_seqlens_q": torch.tensor([0, 2, 5]).int()},
}


def forward_args(
    kv_heads=2,
    dtype=torch.float32,
    mask=None,
    cu_seqlens_q=None,
    q_lengths=None,
    kv_end=None,
    window_left=-1,
):
    packed = cu_seqlens_q is not None
    q_shape, k_shape = ((5, 2, 8), (5, 2, 8)) if packed else ((2, 2, 5, 8), (2, kv_heads, 7, 8))
    q, k, v = (torch.randn(s).to(dtype) for s in (q_shape, k_shape, k_shape))
    return (
        *(q, k, v, mask, cu_seqlens_q, cu_seqlens_q, q_lengths, None, kv_end, *(None,) * 7),
        *(0.3, window_left, -1, False, 5, 5 if packed else 7, 0.0, 0, 0.0),
    )


def featured_args(n=7, dtype=torch.float32):
    """Dense arguments with all features, and all gradients wanted."""
    q, k, v = (torch.randn(2, 2, n, 8, dtype=dtype) for _ in range(3))
    stat = dtype if dtype == torch.float64 else torch.float32
    start = torch.arange(n).expand(2, n)
    intervals = [(start + x).clamp(0, n).int().contiguous() for x in (-2, 3)]
    times = torch.rand(2, n, dtype=stat).cumsum(1)
    biases = [torch.rand(s, dtype=stat) for s in ((2,), (2, 2), (2, 5))]
    mask = torch.randn(1, 2, n, n, dtype=dtype)
    return (
        *(q, k, v, mask, *(None,) * 5, *intervals, times, *biases, torch.tensor([5])),
        *(0.3, -1, -1, False, n, n, 4.0, 2, 0.2),
    )
