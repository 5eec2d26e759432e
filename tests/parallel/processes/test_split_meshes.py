"""Rows of processes share sequences, columns share the batches: the gradients of one process."""

import pytest
import torch
from adapted import assert_no_worse
from needs import GLOO
from spawned import spawned
from split_meshes import WAYS, gradients, whole

pytestmark = [
    pytest.mark.unpoisoned,
    GLOO,
]


@pytest.fixture(scope="module")
def results():
    return spawned(gradients, 2, 2, names=("data", "sequence"))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process(way, results, threads):
    threads(1)
    truth, alone = whole(torch.float64), whole()
    assert_no_worse(results[0][way], truth, [alone], torch.float32)
    for name, actual in results[0][way].items():
        for other in results[1:]:
            assert torch.equal(actual, other[way][name]), name
