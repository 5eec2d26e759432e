"""Sequences that are made when they are read, and the order in which an epoch takes them."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_events  # noqa: E402

from clinattn.training import order as order_module  # noqa: E402
from clinattn.training.corpus import read_corpus  # noqa: E402
from clinattn.training.examples import Listed, sampled  # noqa: E402
from clinattn.training.order import LISTED, Order  # noqa: E402
from clinattn.training.reading import Reader  # noqa: E402
from clinattn.training.sequences import windows  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402
from clinattn.training.standard import Standard  # noqa: E402
from clinattn.training.windowed import Windows  # noqa: E402
from clinattn.workloads import open_source  # noqa: E402
from clinattn.workloads.pieces import Pieces  # noqa: E402
from clinattn.workloads.vocabulary import CLS, SEP  # noqa: E402

HOUR = 3_600_000_000


@pytest.fixture
def folder(tmp_path):
    """Timelines of 1 to 40 events, with 0 to 9 static facts."""
    rng = np.random.default_rng(1)
    rows = []
    for patient in range(1, 30):
        rows += [(patient, None, f"FACT//{i}", None) for i in range(rng.integers(0, 10))]
        times = np.sort(rng.integers(0, 30, rng.integers(1, 41))) * HOUR
        rows += [(patient, int(t), f"C//{rng.integers(9)}", float(t)) for t in times]
    return write_events(tmp_path / "ward", rows)


def same(one, other):
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        if hasattr(a, "numpy"):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
        else:
            assert a == b


def digest_of(examples):
    digest = hashlib.blake2b()
    examples.feed(digest)
    return digest.digest()


@pytest.mark.parametrize("room", [4, 8, 500])
@pytest.mark.parametrize("end", [None, SEP])
def test_windows_by_number_are_those_of_the_whole_timelines(folder, room, end):
    source = open_source(f"meds:{folder}")
    reader = Reader(source, source.vocabulary, times=True)
    at = np.flatnonzero(np.arange(len(source)) % 3 > 0)
    found = Windows(reader, at, at * 10, room, end)
    expected = []
    for place in at.tolist():
        static = int(source.starts[place] - source.begins[place])
        events = reader.whole(place)
        facts, rest = events.take(slice(static)), events.take(slice(static, None))
        expected += windows(facts, rest, CLS, room, place * 10, end=end)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    listed = Listed(expected)
    some = np.array([3, 0, len(found) - 1, 3])
    for name in ("lengths", "subjects", "starts", "labels"):
        np.testing.assert_array_equal(getattr(found, name)(), getattr(listed, name)())
        np.testing.assert_array_equal(getattr(found, name)(some), getattr(listed, name)(some))
    assert digest_of(found) != digest_of(Windows(reader, at, at * 10, room + 1, end))


@pytest.mark.parametrize("pieces", [1, 3], ids="{} pieces".format)
def test_hashes_of_sequences_tell_every_change(folder, pieces):
    source = open_source(f"meds:{folder}")
    places = np.sort(source.begins[1 : 1 + 3 * (pieces - 1) : 3])

    def hashes(**changes):
        columns = {"ids": source.ids, "times": source.times, "values": source.values} | changes
        cut = {name: Pieces(np.split(column, places)) for name, column in columns.items()}
        whole = replace(source, **cut)
        standard = Standard(torch.zeros(99), torch.ones(99))
        reader = Reader(whole, source.vocabulary, times=True, standard=standard)
        return reader.hashes(np.arange(len(source)), source.ends)

    before = hashes()
    assert len(set(before.tolist())) == len(source)
    last = source.ends[7] - 1
    for name, change in (("ids", 1), ("times", 1_000), ("values", 1e9)):
        column = getattr(source, name).copy()
        column[last] += change
        assert np.flatnonzero(hashes(**{name: column}) != before).tolist() == [7]
    swapped = source.ids.copy()
    first = source.starts[9]
    assert swapped[first] != swapped[first + 1]
    swapped[[first, first + 1]] = swapped[[first + 1, first]]
    assert np.flatnonzero(hashes(ids=swapped) != before).tolist() == [9]
    some = np.array([9, 2])
    reader = Reader(source, source.vocabulary)
    short = reader.hashes(some, source.ends[some] - 1)
    assert (short != reader.hashes(some, source.ends[some])).all()
    assert short.tolist() == reader.hashes(np.arange(10), source.ends[:10] - 1)[some].tolist()


@pytest.mark.parametrize("max_tokens", [4, 16, 99])
def test_cuts_by_number_are_as_they_say(folder, max_tokens):
    settings = TrainingSettings(
        data=f"meds:{folder}", task="classify", label_code="C//1", cuts=3, max_tokens=max_tokens
    )
    train = read_corpus(settings, times=True).train
    listed = Listed(train)
    for name in ("lengths", "subjects", "starts", "labels"):
        np.testing.assert_array_equal(getattr(train, name)(), getattr(listed, name)())
    part = train[2:5]
    assert len(part) == 3 and train[-1].ids.tolist() == listed[len(train) - 1].ids.tolist()
    for one, other in zip(part, listed.examples[2:5], strict=True):
        same(one, other)
    with pytest.raises(IndexError):
        train[len(train)]


def test_an_evaluation_of_many_is_of_some_whole_subjects(folder):
    settings = TrainingSettings(data=f"meds:{folder}", max_tokens=8, held_out=0.5)
    whole = read_corpus(settings)
    assert "evaluated are" not in whole.source
    sizes = np.bincount(whole.held_out.subjects(), whole.held_out.lengths()).astype(int)
    limit = int(sizes.sum()) // 2
    part = sampled(whole.held_out, limit)
    kept = np.bincount(part.examples.subjects(), part.examples.lengths(), len(sizes)).astype(int)
    assert all(n in (0, size) for n, size in zip(kept, sizes, strict=True))
    assert limit - sizes.max() < kept.sum() <= limit
    assert f"evaluated are {(kept > 0).sum()} of {(sizes > 0).sum()} subjects" in part.line
    assert len(np.unique(sampled(whole.held_out, 1).examples.subjects())) == 1
    less = read_corpus(TrainingSettings(**vars(settings) | {"eval_tokens": limit}))
    assert "evaluated are" in less.source and less.fingerprint != whole.fingerprint
    assert less.tokens == whole.tokens and len(less.train) == len(whole.train)


@pytest.mark.parametrize("count", [1, 2, LISTED, LISTED + 1, 2**18, 2**18 + 1, 300_001])
def test_an_order_takes_each_once(count):
    places = np.arange(count)
    found = Order(count, 7)[places]
    assert (np.bincount(found, minlength=count) == 1).all() and found.dtype == np.int64
    np.testing.assert_array_equal(Order(count, 7)[places[::-3]], found[::-3])
    if count > 2:
        assert (Order(count, 8)[places] != found).any()


def test_an_order_that_is_computed_mixes(monkeypatch):
    """Over many seeds each number comes to each place as often: chi-squared, 5 sigma."""
    monkeypatch.setattr(order_module, "LISTED", 0)
    count, seeds = 23, 4000
    seen = np.zeros((count, count))
    for seed in range(seeds):
        seen[np.arange(count), Order(count, seed)[np.arange(count)]] += 1
    expected, freedom = seeds / count, (count - 1) ** 2
    chi = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5
