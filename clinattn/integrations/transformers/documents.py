"""Documents of a packed row, as position_ids that start over tell them.

transformers looks for documents where it gets no attention_mask. With one, even of ones alone, a
row is a single document, here as there; warn_of_one_document says so.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad

from clinattn.integrations.transformers.masks import parts_of
from clinattn.operator.visibility import concrete

WARNING = (
    "attention_mask has ones alone and position_ids start over: with a mask, transformers takes a "
    "row for one document, and its tokens see those of the documents before them; give "
    "attention_mask=None (and use_cache=False), or cu_seq_lens_q and cu_seq_lens_k, to keep "
    "documents apart"
)


class _Done:
    """warned: the warning was given. read: positions were read from a device, which waits."""

    warned = False
    read = False


def start_over(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(starts of documents (B, N - 1) after the first, rows (B, 1) that hold several).

    0 1 2 0 1 are two documents. Positions that repeat or leave numbers out, such as those of
    visits, are not documents.
    """
    step = position_ids.diff(dim=1)
    starts = (step <= 0) & (position_ids[:, 1:] == position_ids[:, :1])
    several = ((step == 1) | starts).all(1) & (step < 0).any(1)
    return starts, several[:, None]


def documents(position_ids: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Segment ids (1, N) of a row whose positions start over; None for other rows."""
    shape = (1, query.shape[2])
    if position_ids is None or position_ids.shape != shape or query.shape[0] != 1:
        return None
    if key.shape[2] != shape[1] or shape[1] < 2:
        return None
    starts, several = start_over(position_ids)
    if concrete(position_ids) and not several:
        return None
    return pad(starts.cumsum(1), (1, 0)) * several


def warn_of_one_document(
    mask: Tensor, position_ids: Tensor | None, query: Tensor, key: Tensor
) -> None:
    """Warns, once, where a mask of ones alone switches off the packing of position_ids.

    mask: of the keys as transformers hands it on, (B, N) or a PatternMask; others are the caller's.
    A mask is looked at in the first layer that gets it; on a device, where the host has to wait for
    what it reads, only the first of all.
    """
    n = query.shape[2]
    if _Done.warned or position_ids is None or torch.compiler.is_compiling():
        return
    if position_ids.dim() != 2 or not position_ids.shape[1] == key.shape[2] == n > 1:
        return
    keys, pattern = parts_of(mask)
    of_keys = keys.dim() == 2 or (pattern is not None and pattern.padded)
    if not of_keys or getattr(mask, "examined", False) or not _may_read(position_ids):
        return
    mask.examined = True  # type: ignore[attr-defined]
    whole = keys.reshape(len(keys), n).ne(0).all(1, keepdim=True)
    _, several = start_over(position_ids)
    if bool((several & whole).any()):
        _Done.warned = True
        warnings.warn(WARNING, stacklevel=4)


def _may_read(x: Tensor) -> bool:
    if concrete(x):
        return True
    if _Done.read or not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    _Done.read = True
    return True
