"""Models whose sequences are split over processes: losses and gradients of one process."""

import pytest
import torch
from adapted import assert_no_worse
from needs import GLOO
from spawned import spawned
from split_models import HEADS, split_models, whole
from yardstick import shared

pytestmark = [
    pytest.mark.unpoisoned,
    GLOO,
]


@pytest.fixture(scope="module")
def results():
    return spawned(split_models, 3)


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_are_those_of_one_process(name, results, threads):
    """DistributedDataParallel gives every process the mean over them."""
    threads(1)
    truth = shared(lambda: whole(name, torch.float64), name, "fp64")
    alone = shared(lambda: whole(name), name)
    assert_no_worse(results[0][name], truth, [alone], torch.float32)
    for what, actual in results[0][name].items():
        assert torch.equal(actual, results[1][name][what]), what
