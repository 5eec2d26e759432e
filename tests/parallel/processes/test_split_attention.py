"""Attention over one, three and four processes over gloo: that of one process, with gradients."""

import pytest
import torch
from needs import GLOO
from spawned import spawned
from split_calls import CASES, SAME_BITS, UNEVEN, split_results
from support import assert_close
from yardstick import shared

pytestmark = [
    pytest.mark.unpoisoned,
    GLOO,
]
WORLDS = (1, 3, 4)
TABLE = [(world, name) for world in WORLDS for name in CASES] + [(3, name) for name in UNEVEN]
# A prefix is merged from several calls.
UNMERGED = [x for x in TABLE if "global_prefix" not in (CASES | UNEVEN)[x[1]].words]
AT_ONCE = [x for x in UNMERGED if x[1] in SAME_BITS or x[0] == 1]


@pytest.fixture(scope="module")
def results():
    """Results by world and case."""
    return {world: spawned(split_results, world)[0] for world in WORLDS}


@pytest.mark.parametrize("world, name", TABLE)
def test_results_are_those_of_one_process(world, name, results, threads):
    threads(1)
    case = (CASES | UNEVEN)[name]
    truth = shared(case.truth, name)
    whole = shared(case.whole, name, "in its dtype")
    for what, actual in results[world][name].items():
        assert_close(what, actual, truth[what], whole[what])


@pytest.mark.parametrize("world, name", AT_ONCE)
def test_keys_attended_at_once_keep_the_bits_of_one_process(world, name, results, threads):
    threads(1)
    case = (CASES | UNEVEN)[name]
    whole = shared(case.whole, name, "in its dtype")
    for what in ("o", "lse", "dq"):
        assert torch.equal(results[world][name][what], whole[what]), what
