"""Jagged nested tensors of every make, for tests."""

import torch


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts_of(lengths, heads, dim, seed, dtype=torch.float32):
    """Leaves (n, heads, dim), one for each sequence."""
    return [
        drawn(seed + at, n, heads, dim).to(dtype).requires_grad_() for at, n in enumerate(lengths)
    ]


def packed(parts):
    """(B, H, j, D): a transposed view of tokens that lie one after the other."""
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def heads_outside(parts):
    """(B, H, j, D) whose memory is (H, tokens, D)."""
    return torch.nested.as_nested_tensor([x.transpose(0, 1) for x in parts], layout=torch.jagged)


def sliced(parts):
    """(B, H, j, D): heads that are a slice of wider rows, as of one projection for q, k and v."""
    wide = [torch.cat([x, torch.full_like(x, float("nan"))], 1) for x in parts]
    return torch.nested.as_nested_tensor(wide, layout=torch.jagged).chunk(2, 2)[0].transpose(1, 2)


def with_holes(parts):
    """(B, H, j, D) within a buffer whose padding, at both ends of a sequence, is NaN."""
    most = max(map(len, parts)) + 3
    starts = [at % 3 for at in range(len(parts))]
    rows = [
        torch.nn.functional.pad(x, (0, 0, 0, 0, first, most - first - len(x)), value=float("nan"))
        for first, x in zip(starts, parts, strict=True)
    ]
    lengths = torch.tensor([len(x) for x in parts])
    buffer = torch.stack(rows)
    nested = torch.nested.narrow(buffer, 1, torch.tensor(starts), lengths, layout=torch.jagged)
    assert nested.lengths() is not None
    return nested.transpose(1, 2)


MAKES = {
    "packed": packed, "heads outside": heads_outside, "sliced": sliced, "holes": with_holes,
}  # fmt: skip
