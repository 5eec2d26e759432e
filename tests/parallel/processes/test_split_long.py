"""A long sequence over four processes: results of one, halos alone sent, memory by process."""

import os
from functools import partial

import pytest
import torch
from needs import GLOO
from spawned import spawned
from split_long import (
    HEAD_DIM,
    HEADS,
    KINDS,
    LONG,
    SHORT,
    WINDOW,
    inputs,
    measured,
    results,
    split_long,
)
from support import assert_close

pytestmark = [
    pytest.mark.unpoisoned,
    GLOO,
]
TOKEN = HEADS * HEAD_DIM * 4  # bytes
LENGTHS = [("windowed", LONG), ("global", SHORT)]
if os.environ.get("CLINATTN_TESTS") == "every":  # it takes minutes
    LENGTHS.append(("global", LONG))


def truth(kind, alone, chosen):
    """o, lse and gradients of chosen tokens in fp64. alone: results of one process.

    Its lse and o say how queries weigh the chosen keys, of which each sees few.
    """
    tokens = alone["o"].shape[2]
    q, k, v, do = (x[0, 0].double() for x in inputs(tokens).values())
    lse, o_of_all, scale = alone["lse"][0, 0].double(), alone["o"][0, 0].double(), HEAD_DIM**-0.5
    seen = torch.ones(len(chosen), tokens, dtype=torch.bool)
    if kind == "windowed":
        seen = (torch.arange(tokens) - chosen[:, None]).abs() <= WINDOW
    s = (scale * q[chosen] @ k.T).masked_fill(~seen, -torch.inf)
    p = s.softmax(-1)
    o = p @ v
    ds = p * (do[chosen] @ v.T - (do[chosen] * o).sum(-1, keepdim=True))
    found = {"o": o, "lse": s.logsumexp(-1), "dq": scale * ds @ k}
    # the queries that see a key are those that a query in its place sees
    p = (scale * k[chosen] @ q.T - lse).exp().masked_fill(~seen, 0)
    ds = p * (v[chosen] @ do.T - (do * o_of_all).sum(-1))
    return found | {"dk": scale * ds @ q, "dv": p @ do}


@pytest.mark.parametrize("kind, tokens", LENGTHS)
def test_a_long_sequence_has_the_results_of_one_process(kind, tokens, threads):
    """At tokens of all shards, those at their ends among them."""
    split = spawned(partial(split_long, kind=kind, tokens=tokens), 4, seconds=600)[0]
    threads(1)
    alone = results(inputs(tokens), KINDS[kind])
    chosen = torch.arange(tokens).view(4, -1)[:, :: tokens // 64 - 1].flatten()
    expected = truth(kind, alone, chosen)
    for name, x in split.items():
        assert_close(name, x[0, 0, chosen], expected[name], alone[name][0, 0, chosen])


@pytest.fixture(scope="module")
def costs():
    return {world: spawned(measured, world) for world in (4, 6)}


@pytest.mark.parametrize("world", (4, 6))
def test_windowed_layers_send_two_halos(world, costs):
    """Keys and values forward, and their gradients backward; an end of the sequence has one."""
    for rank, found in enumerate(costs[world]):
        neighbours = 2 - (rank in (0, world - 1))
        sent, _ = found["windowed"]
        assert [sum(x) for x in sent if x] == [2 * neighbours * WINDOW * TOKEN] * 2


@pytest.mark.parametrize("world", (4, 6))
def test_global_layers_send_the_keys_of_a_process_to_each_other_one(world, costs):
    for rank, found in enumerate(costs[world]):
        shard = len(torch.arange(SHORT).tensor_split(world)[rank])
        sent, _ = found["global"]
        # forward and backward, and gradients of the keys of others
        assert sum(map(sum, sent)) >= 2 * 2 * (world - 1) * shard * TOKEN


@pytest.mark.parametrize("kind, shards", [("windowed", 15), ("global", 22)])
def test_memory_of_a_process_falls_with_their_number(kind, shards, costs):
    """A process has so many tensors of its own tokens at most: q, k, v, o and do are five."""
    for world in costs:
        tokens = -(-SHORT // world)
        for found in costs[world]:
            assert found[kind][1] <= shards * tokens * TOKEN
