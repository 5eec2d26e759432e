"""Columns in pieces: read as one array is, and told what was touched."""

import numpy as np
import pytest

from clinattn.workloads import source as source_module
from clinattn.workloads.pieces import Pieces, bounds_of, through
from clinattn.workloads.source import Source
from clinattn.workloads.vocabulary import SPECIAL_TOKENS, Vocabulary

WHOLE = np.arange(100, 123)


def in_pieces(whole=WHOLE, cuts=(0, 5, 5, 12), **given):
    return Pieces(np.split(whole, cuts), **given)


def test_pieces_read_as_one_array():
    pieces = in_pieces()
    assert len(pieces) == 23 and pieces.dtype == WHOLE.dtype
    for start in range(-3, 26):
        for stop in (*range(-3, 26), None):
            np.testing.assert_array_equal(pieces[start:stop], WHOLE[start:stop])
    for place in range(-23, 23):
        assert pieces[place] == WHOLE[place]
    places = np.array([4, 5, 11, 12, 4])
    np.testing.assert_array_equal(pieces[places], WHOLE[places])
    assert not len(pieces[places[:0]])
    np.testing.assert_array_equal(pieces, WHOLE)
    for wrong in (23, -24):
        with pytest.raises(IndexError):
            pieces[wrong]
    with pytest.raises(ValueError, match="step=2"):
        pieces[::2]


def test_a_slice_of_one_part_is_a_view_and_counted():
    touched = []
    pieces = in_pieces(touched=touched.append)
    assert np.shares_memory(pieces[12:20], WHOLE) and touched == [8 * 8]
    assert not np.shares_memory(pieces[4:6], WHOLE)


def test_a_table_stands_between():
    table = np.arange(200)[::-1]
    twice = through(through(in_pieces(), table), table + 1000)
    np.testing.assert_array_equal(twice[3:9], table[table[WHOLE]][3:9] + 1000)
    np.testing.assert_array_equal(through(WHOLE, table), table[WHOLE])
    assert bounds_of(twice).tolist() == [0, 0, 5, 5, 12, 23]
    assert bounds_of(WHOLE).tolist() == [0, 23]


@pytest.mark.parametrize("at_once", [1, 5, 100])
@pytest.mark.parametrize("scattered", [False, True], ids=["in_order", "scattered"])
@pytest.mark.parametrize("cuts", [[], [4], [4, 9], [0, 9, 10]], ids=str)
def test_a_pass_over_parts_counts_what_it_is_asked(monkeypatch, cuts, scattered, at_once):
    """Sequences of 4, 0, 5 and 1 events, in whatever order and pieces."""
    monkeypatch.setattr(source_module, "AT_ONCE", at_once)
    sizes = np.array([4, 0, 5, 1])
    ends = sizes.cumsum()
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 8, 10).astype(np.int32)
    order = rng.permutation(4) if scattered else np.arange(4)
    source = Source(
        name="x", title="x", unit="patients", where="x", subjects=[1, 2, 3, 4],
        begins=(ends - sizes)[order], starts=(ends - sizes)[order], ends=ends[order],
        ids=Pieces(np.split(ids, cuts)), vocabulary=Vocabulary((*SPECIAL_TOKENS, "a", "b", "c")),
    )  # fmt: skip
    until = source.begins + rng.integers(0, 9, 4) % (source.ends - source.begins + 1)
    read = np.concatenate([ids[b:u] for b, u in zip(source.begins, until, strict=True)])
    np.testing.assert_array_equal(source.counts(until), np.bincount(read, minlength=8))
    np.testing.assert_array_equal(source.counts(), np.bincount(ids, minlength=8))
    parts = list(source.parts())
    assert sorted(np.concatenate([part.indices for part in parts]).tolist()) == [0, 1, 2, 3]
    large = [part for part in parts if part.at.stop - part.at.start > at_once]
    assert all(len(part.indices) == 1 for part in large)
    part = source.only(source.ends - source.begins > 1)
    assert part.counts().sum() == 9 and len(part) == 2
