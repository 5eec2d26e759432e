"""Batches that are full, steps whose batches cost alike, and ranks that have as much to do."""

from __future__ import annotations

import random

import pytest

from clinattn.encoder import EncoderConfig
from clinattn.training.balance import OPEN, balanced, cost_of, filled, shares

SHAPE = {"vocab_size": 100, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12}


def drawn(count, longest, seed=0):
    """Lengths as of timelines: many that are cut at the longest, and a tail of short ones."""
    draw = random.Random(seed)
    return [min(longest, int(draw.lognormvariate(5, 2)) + 1) for _ in range(count)]


@pytest.mark.parametrize("max_tokens", [512, 2048, 4096])
def test_batches_are_filled_to_the_brim(max_tokens):
    lengths = drawn(3000, 512)
    batches = [*filled(enumerate(lengths), max_tokens)]
    tokens = [sum(lengths[i] for i in batch) for batch in batches]
    assert sorted(i for batch in batches for i in batch) == [*range(len(lengths))]
    assert all(batch == sorted(batch) for batch in batches) and max(tokens) <= max_tokens
    assert sum(tokens) > 0.98 * max_tokens * (len(batches) - OPEN)


def test_batches_of_few_sequences():
    assert [*filled([], 8)] == []
    assert [*filled(enumerate([3, 5, 1, 8]), 8)] == [[0, 1], [3], [2]]
    assert [*filled(enumerate([8, 8]), 8)] == [[0], [1]]


@pytest.mark.parametrize(
    "shape, expected",
    [
        ({"num_layers": 1}, lambda n: n * (2 * (256 + 192) + 4 * 8 * n)),
        ({"num_layers": 1, "activation": "geglu"}, lambda n: n * (2 * (256 + 288) + 4 * 8 * n)),
        ({"num_layers": 1, "causal": True}, lambda n: n * (2 * (256 + 192) + 4 * 8 * (n // 2))),
        (
            {"num_layers": 2, "windows": (None, 3)},
            lambda n: n * (4 * (256 + 192) + 4 * 8 * (n + min(n, 7))),
        ),
    ],
    ids=["full", "gated", "causal", "local"],
)
def test_cost_counts_products(shape, expected):
    config = EncoderConfig(**{"max_positions": 64, "activation": "gelu"} | SHAPE | shape)
    for tokens in (1, 6, 50):
        assert cost_of(config, 0.0)(tokens) == expected(tokens)
        assert cost_of(config, 0.5)(tokens) == expected(tokens) + tokens * 8 * (8 + 100)


def test_a_step_is_shared_out_anew():
    """Epoch by epoch; sequences of a batch keep their order, and so do those drawn together."""
    lengths = dict(enumerate([9, 9, 9, 2, 2, 2, 1, 1]))
    step = [(3, [0, 3, 1]), (3, [4, 5, 6]), (4, [2, 7])]
    alike = [(3, [0, 3, 5]), (3, [1, 4, 6]), (4, [2, 7])]
    assert balanced(step, lengths, 20, lambda n: n * n) == alike


def test_a_step_that_is_full_stays():
    lengths, step = {0: 4, 1: 4, 2: 3, 3: 3, 4: 2}, [(0, [0, 1]), (0, [2, 3, 4])]
    assert balanced(step, lengths, 8, lambda n: n) == step
    assert balanced(step, lengths, 9, lambda n: n) == step  # a cut of 9 and 7 is no better
    step = [(0, [0, 1, 4]), (0, [2, 3])]
    assert balanced(step, lengths, 10, lambda n: n) == [(0, [0, 4, 2]), (0, [1, 3])]


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_batches_of_a_step_cost_alike(accumulate):
    config = EncoderConfig.preset("tiny", vocab_size=5000)
    cost, lengths = cost_of(config, 0.3), dict(enumerate(drawn(4000, 512)))
    batches = filled(lengths.items(), 8192)
    for _ in range(3):
        step = [(0, next(batches)) for _ in range(accumulate)]
        found = balanced(step, lengths, 8192, cost)
        assert sorted(i for _, b in found for i in b) == sorted(i for _, b in step for i in b)
        assert all(sum(lengths[i] for i in batch) <= 8192 for _, batch in found)
        before, after = (
            [sum(cost(lengths[i]) for i in batch) for _, batch in x] for x in (step, found)
        )
        assert max(after) <= max(before) and max(after) < 1.02 * sum(after) / accumulate


def test_ranks_share_batches_by_cost():
    assert shares([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert shares([9, 1, 8, 2], 2) == [[0, 1], [2, 3]]
    assert shares([7], 1) == [[0]] and shares([1, 2, 3], 3) == [[2], [1], [0]]
