"""Pieces of a store: which files they are read from, and where they are cut."""

from __future__ import annotations

import numpy as np
import pytest

from clinattn.workloads.store.inputs import Input
from clinattn.workloads.store.plan import FileScan, pieces_of
from clinattn.workloads.store.scan import Unit, summed, units_of


def scan_of(events: dict[int, int], *groups: tuple[int, int]) -> FileScan:
    """A file with so many events of each subject. groups: the range of each row group."""
    subjects = np.array(list(events), dtype=np.int64)
    lows, highs = zip(*(groups or [(min(events, default=0), max(events, default=-1))]), strict=True)
    return FileScan(subjects, np.array(list(events.values())), np.array(lows), np.array(highs))


def found(files, most):
    return [(p.low, p.high, p.subjects, p.events, p.parts) for p in pieces_of(files, most)]


def test_small_files_are_one_piece_and_a_large_one_is_cut_between_subjects():
    files = [scan_of({1: 2, 2: 2}), scan_of({9: 3}), scan_of({4: 4, 5: 4, 6: 4, 7: 1})]
    assert found(files, 8) == [
        (1, 9, 3, 7, ((0, (0,)), (1, (0,)))),
        (4, 5, 2, 8, ((2, (0,)),)),
        (6, 7, 2, 5, ((2, (0,)),)),
    ]


def test_files_that_share_a_subject_are_together_wherever_they_stand():
    files = [scan_of({1: 3, 2: 3}), scan_of({5: 6}), scan_of({2: 3, 3: 3})]
    assert found(files, 9) == [
        (1, 2, 2, 9, ((0, (0,)), (2, (0,)))),
        (3, 3, 1, 3, ((2, (0,)),)),
        (5, 5, 1, 6, ((1, (0,)),)),
    ]


def test_a_subject_with_more_events_than_a_piece_is_one_alone():
    assert found([scan_of({1: 1, 2: 50, 3: 1})], 10) == [
        (1, 1, 1, 1, ((0, (0,)),)),
        (2, 2, 1, 50, ((0, (0,)),)),
        (3, 3, 1, 1, ((0, (0,)),)),
    ]


def test_row_groups_without_the_subjects_of_a_piece_are_not_read():
    file = scan_of({1: 5, 2: 5, 3: 5, 4: 5}, (1, 2), (2, 3), (3, 4), (0, -1))
    assert [parts for *_, parts in found([file], 5)] == [
        ((0, (0,)),), ((0, (0, 1)),), ((0, (1, 2)),), ((0, (2,)),)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_pieces_hold_each_subject_once_and_files_with_it(seed):
    rng = np.random.default_rng(seed)
    most, files = 40, []
    for _ in range(int(rng.integers(1, 9))):
        subjects = np.unique(rng.integers(-50, 200, int(rng.integers(0, 20)))).tolist()
        files.append(scan_of({s: int(rng.integers(1, 60)) for s in subjects}))
    pieces = pieces_of(files, most)
    seen: set[int] = set()
    for number, piece in enumerate(pieces):
        assert piece.number == number
        own = [set(file.subjects.tolist()) for file in files]
        held = {
            s for i, _ in piece.parts for s in own[i] if piece.low <= s <= piece.high
        }
        assert not held & seen and len(held) == piece.subjects
        seen |= held
        assert not [
            i for i, subjects in enumerate(own)
            if subjects & held and i not in dict(piece.parts)
        ]  # fmt: skip
        sizes = [
            int(events) for i, _ in piece.parts
            for s, events in zip(files[i].subjects.tolist(), files[i].events, strict=True)
            if s in held
        ]  # fmt: skip
        assert sum(sizes) == piece.events and (piece.events <= most or len(held) == 1)
    assert seen == {s for file in files for s in file.subjects.tolist()}


def test_units_are_runs_of_row_groups():
    files = [Input("a", 1, 1, "", (5, 5, 5)), Input("b", 1, 1, "", ()), Input("c", 1, 1, "", (20,))]
    assert units_of(files, 10) == [Unit(0, 0, 2), Unit(0, 2, 3), Unit(2, 0, 1)]


def test_sums_of_keys():
    keys, sums = summed(np.array([3, 1, 3, 2, 1]), np.array([1, 2, 3, 4, 5]))
    assert keys.tolist() == [1, 2, 3] and sums.tolist() == [7, 4, 4]
    assert summed(np.array([1, 2]), np.array([7, 8]))[1].tolist() == [7, 8]
    assert len(summed(np.zeros(0, int), np.zeros(0, int))[0]) == 0
