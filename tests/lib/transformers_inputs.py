"""Masks as transformers describes them, and the settings they come with."""

import inspect
from types import SimpleNamespace

import torch
from transformers import masking_utils

WINDOW = 5
CAUSAL = masking_utils.causal_mask_function
BIDIRECTIONAL = masking_utils.bidirectional_mask_function
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 6], [*range(13)]])
DOCUMENTS = masking_utils.find_packed_sequence_indices(POSITIONS)
PADDING = torch.ones(2, 13, dtype=torch.bool)
PADDING[0, 9:] = False
PADDING[1, :2] = False
RIGHT = torch.arange(13) < torch.tensor([[9], [13]])


def packed(function):
    """Joins the parts of a mask as create_causal_mask of this release does."""
    same = masking_utils.packed_sequence_mask_function(DOCUMENTS)
    remapped = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # none in 5.0
    within = remapped(function, POSITIONS) if remapped else function
    earlier = hasattr(masking_utils, "packed_sequence_compatibility_function")
    return masking_utils.and_masks(*((same, within) if earlier else (within, same)))


SLIDING = masking_utils.sliding_window_causal_mask_function(WINDOW)
AROUND = getattr(masking_utils, "sliding_window_bidirectional_mask_function", None)  # none in 5.0
CHUNKED = masking_utils.chunked_causal_mask_function(WINDOW, torch.zeros(2, dtype=torch.long))
BLOCKS = masking_utils.or_masks(CAUSAL, lambda b, h, q, k: DOCUMENTS[b, q] == DOCUMENTS[b, k])
EVERY_OTHER = masking_utils.and_masks(CAUSAL, lambda b, h, q, k: (q - k) % 2 == 0)
LOCAL = {"local_size": WINDOW}
NO_SKIP = {"allow_is_causal_skip": False}
BOTH_WAYS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}

# As transformers calls a mask function; whether the answer stays O(N).
MASKS = {
    "causal": (CAUSAL, {}, True),
    "bidirectional": (BIDIRECTIONAL, BOTH_WAYS, True),
    "sliding": (SLIDING, LOCAL, True),
    **({"sliding-both-ways": (AROUND(WINDOW), LOCAL | BOTH_WAYS, True)} if AROUND else {}),
    "packed": (packed(CAUSAL), NO_SKIP, True),
    "packed-sliding": (packed(SLIDING), LOCAL | NO_SKIP, True),
    "causal-to-be-changed": (CAUSAL, NO_SKIP, False),
    "chunked": (CHUNKED, LOCAL, False),
    "blocks": (BLOCKS, NO_SKIP, False),
    "overlay": (EVERY_OTHER, NO_SKIP | {"use_vmap": True}, False),
}
LENGTHS = {"square": (13, 13, 0, 0), "cached": (4, 13, 9, 0), "sliding-cache": (4, 8, 9, 5)}


def config(**words):
    return SimpleNamespace(sliding_window=WINDOW, **words)


BY_POSITION = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters  # 5.0


def queries(length, offset=0):
    """The words by which this release of transformers says for which queries a mask is."""
    if BY_POSITION:
        return {"cache_position": torch.arange(length) + offset}
    return {"q_length": length, "q_offset": offset}


def their_mask(batch, nq, nk, offset=0, **words):
    """The dense mask of transformers itself."""
    words = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False} | words
    return masking_utils.sdpa_mask(
        batch_size=batch, kv_length=nk, **queries(nq, offset), **words
    )
