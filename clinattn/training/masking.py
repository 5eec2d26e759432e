"""Dynamic masking for a masked language model."""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.encoder.heads import IGNORE

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stay as they are (BERT)


def mask_tokens(
    ids: Tensor, share: float, mask: int, ordinary: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns masked ids (N,) for the model, and labels (N,): the id where chosen, else -100.

    A token is chosen with probability `share`: BERT has 0.15, ModernBERT 0.3. Of the chosen, 80 %
    are masked and 10 % are another token's id. ordinary: (V,) bool, the ids that can be chosen,
    and can replace. The same seed masks the same.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(len(ids), generator=generator) < share) & ordinary[ids]
    fate = torch.rand(len(ids), generator=generator)
    content = ordinary.nonzero().squeeze(1)
    others = content[torch.randint(len(content), (len(ids),), generator=generator)]
    seen = torch.where(chosen & (fate < MASKED), mask, ids)
    seen = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + REPLACED), others, seen)
    return seen, ids.masked_fill(~chosen, IGNORE)
