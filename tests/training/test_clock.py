"""Seconds that ranks work and wait."""

import math
import time

import pytest
import torch

from clinattn.training.clock import Clock, own_column, waited
from clinattn.training.ranks import Ranks


def test_a_rank_waits_for_the_slowest():
    tables = [own_column([1.0 + rank, 2.0], Ranks(rank, 4)) for rank in range(4)]
    assert tables[2].tolist() == [[0, 0, 3, 0], [0, 0, 2, 0]]
    assert waited(sum(tables)) == pytest.approx((3 + 2 + 1 + 0) / 4)
    assert waited(own_column([5.0, 7.0], Ranks())) == 0.0


def test_an_end_that_is_not_known_is_nan():
    clock = Clock(torch.device("cpu"))
    begin = clock.mark()
    time.sleep(0.01)
    known, unknown = clock.seconds_of([(begin, clock.mark()), (begin, None)])
    assert known >= 0.01 and math.isnan(unknown)
    assert math.isnan(waited(own_column([known, unknown], Ranks())))
