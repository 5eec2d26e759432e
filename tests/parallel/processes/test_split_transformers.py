"""Replaced models of transformers over three processes: logits and gradients of one."""

import pytest
import torch
from adapted import assert_no_worse
from needs import GLOO
from spawned import spawned
from split_transformers import MODELS, split_transformers, whole

pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.unpoisoned,
    GLOO,
]


@pytest.fixture(scope="module")
def results():
    return spawned(split_transformers, 3)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_one_process(name, results, threads):
    threads(1)
    naive = [whole(name), whole(name, backwards=True)]
    assert_no_worse(results[0][name], whole(name, torch.float64), naive, torch.float32)


def test_calls_that_a_part_would_change_are_refused(results):
    """In all processes, whichever of them can tell."""
    for result in results:
        default, documents, *masks = result["refused"]
        assert "position_ids: got [0, 1, 2, 3], ... for tokens from 34 on" in default
        assert "position_ids: got [0, 1, 2, 3], ... for tokens from 0 on" in documents
        assert all("attention_mask: not served" in said for said in masks)
