"""The masks that transformers is given are those that it would make."""

import pytest
import torch
from transformers import masking_utils
from transformers_inputs import CAUSAL, LENGTHS, MASKS, PADDING, WINDOW, config

from clinattn.integrations.transformers_masks import attention_mask, parts_of


@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
@pytest.mark.parametrize(
    "kind, lengths",
    # transformers packs whole rows only
    [(x, n) for x in MASKS for n in LENGTHS if "packed" not in x or n == "square"],
)
def test_masks_are_those_of_transformers(kind, lengths, padding):
    function, words, linear = MASKS[kind]
    q_length, kv_length, q_offset, kv_offset = LENGTHS[lengths]
    if kind == "chunked":
        settings = config(attention_chunk_size=WINDOW)
    else:
        settings = config()
    keywords = {
        "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": function, "attention_mask": padding,
    }  # fmt: skip
    theirs = masking_utils.sdpa_mask(**keywords, **words | {
        "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False
    })  # fmt: skip
    ours = attention_mask(**keywords, **words, config=settings, dtype=torch.float32)
    assert (parts_of(ours)[1] is not None) == linear
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)


def test_static_caches_get_dense_masks():
    mask = attention_mask(
        2, 3, 13, q_offset=torch.tensor(4), mask_function=CAUSAL, attention_mask=PADDING,
        config=config(),
    )  # fmt: skip
    theirs = masking_utils.sdpa_mask(
        2, 3, 13, q_offset=torch.tensor(4), attention_mask=PADDING, allow_is_causal_skip=False
    )
    assert parts_of(mask)[1] is None and torch.equal(mask, theirs)
