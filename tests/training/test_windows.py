"""Windows of long notes: every token is read, and a note answers from its own windows alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from clinattn.training.sequences import starts_of
from clinattn.training.windows import POOLS, by_note, note_windows, notes_of, pooled
from clinattn.workloads import Vocabulary
from clinattn.workloads.vocabulary import CLS, SEP

FRAMED = Vocabulary(("a",) * 500, end=SEP)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("count", [0, 1, 13, 14, 15, 113, 1000])
def test_every_token_is_read_in_order_between_its_special_tokens(count, overlap):
    ids = torch.arange(5, 5 + count) % 400
    found = note_windows(ids, FRAMED, 16, overlap)
    assert all(e.ids[0] == CLS and e.ids[-1] == SEP and len(e) <= 16 for e in found)
    assert [e.part for e in found] == list(range(len(found)))
    starts = starts_of(count, 14, overlap)
    assert len(starts) == len(found) and starts == sorted(set(starts))
    read = torch.zeros(count, dtype=torch.bool)
    for at, window in zip(starts, found, strict=True):
        content = window.ids[1:-1]
        assert torch.equal(content, ids[at : at + len(content)])
        read[at : at + len(content)] = True
    assert read.all()
    if overlap and count > 14:
        assert {len(e) for e in found} == {16}  # none is a short rest
        steps = [b - a for a, b in pairwise(starts)]
        assert max(steps) <= max(1, 14 - round(overlap * 14))


def test_notes_are_told_apart():
    notes = [torch.arange(n) for n in (3, 40, 1, 20)]
    examples = [e for ids in notes for e in note_windows(ids, FRAMED, 10, 0.25)]
    found = [examples[at] for at in notes_of(examples)]
    assert [len(windows) for windows in found] == [1, 7, 1, 3]
    assert len(note_windows(notes[1], FRAMED, 10, 0.25, "first")) == 1


def test_pooling_is_as_published():
    logits = torch.randn(5, 3, dtype=torch.float64)
    p = logits.softmax(-1)
    expected = (p.max(0).values + p.mean(0) * 5 / 2) / (1 + 5 / 2)  # Huang et al., 2019, c = 2
    found = pooled(logits, "readmission").softmax(-1)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-12, atol=0)
    assert torch.equal(pooled(logits, "max"), logits.max(0).values)
    assert torch.equal(pooled(logits, "mean"), logits.mean(0))
    assert torch.equal(pooled(logits, "first"), logits[0])


@pytest.mark.parametrize("pool", POOLS)
def test_a_note_answers_alone_as_among_others_and_a_short_one_as_its_window(pool):
    notes = [torch.arange(n) for n in (40, 3, 25)]
    parts = [note_windows(ids, FRAMED, 10, 0.25, pool) for ids in notes]
    logits = [torch.randn(len(windows), 4) for windows in parts]
    together = by_note(torch.cat(logits), [e for windows in parts for e in windows], pool)
    for i, windows in enumerate(parts):
        assert torch.equal(together[i], by_note(logits[i], windows, pool)[0])
    assert torch.equal(together[1], logits[1][0].double())
