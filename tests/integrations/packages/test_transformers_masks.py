"""The masks that transformers is given are those that it would make."""

import pytest
import torch
from transformers_inputs import (
    BY_POSITION,
    CAUSAL,
    LENGTHS,
    MASKS,
    PADDING,
    WINDOW,
    config,
    queries,
    their_mask,
)

from clinattn.integrations.transformers.masks import attention_mask, parts_of


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
    shared = {"kv_offset": kv_offset, "mask_function": function, "attention_mask": padding}
    no_skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    theirs = their_mask(2, q_length, kv_length, q_offset, **shared, **words | no_skip)
    ours = attention_mask(
        batch_size=2, kv_length=kv_length, **queries(q_length, q_offset), **shared, **words,
        config=settings, dtype=torch.float32,
    )  # fmt: skip
    assert (parts_of(ours)[1] is not None) == linear
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)


def test_positions_of_queries_count_as_a_length_and_an_offset():
    """transformers 5.0 hands a mask function the positions of its queries."""
    words = {"kv_length": 13, "attention_mask": PADDING, "config": config()}
    by_length = attention_mask(2, 3, q_offset=4, **words)
    by_position = attention_mask(2, cache_position=torch.arange(4, 7), **words)
    assert parts_of(by_position)[1] is not None and torch.equal(by_position, by_length)


def test_positions_that_leave_some_out_get_dense_masks_or_are_refused():
    places = torch.tensor([0, 2, 3, 9])
    words = {"kv_length": 13, "cache_position": places, "config": config()}
    if not BY_POSITION:  # later releases have no words for them
        with pytest.raises(ValueError, match="cache_position: expected consecutive positions"):
            attention_mask(2, **words)
        return
    mask = attention_mask(2, **words)
    assert parts_of(mask)[1] is None
    assert torch.equal(mask[0, 0], torch.arange(13) <= places[:, None])


def test_static_caches_get_dense_masks():
    mask = attention_mask(
        2, 3, 13, q_offset=torch.tensor(4), mask_function=CAUSAL, attention_mask=PADDING,
        config=config(),
    )  # fmt: skip
    theirs = their_mask(2, 3, 13, torch.tensor(4), attention_mask=PADDING)
    assert parts_of(mask)[1] is None and torch.equal(mask, theirs)
