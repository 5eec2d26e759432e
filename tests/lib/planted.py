"""MEDS folders of real timelines with a planted cause: one code makes the label, and is known.

Pieces of the timelines of a MEDS folder become two patients each, of whom one has CAUSE at a random
place of the first half, which a classifier sees, and OUTCOME at the end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from patients import write_events

from clinattn.workloads import read_meds
from clinattn.workloads.seeds import is_held_out
from clinattn.workloads.source import BIRTH, NO_TIME

CAUSE, OUTCOME = "PLANTED//CAUSE", "OUTCOME//LATER"
HELD_OUT = 0.2


def write_planted(
    source: Path, root: Path, events: int = 120, pieces: int = 10, seed: int = 0
) -> dict[int, bool]:
    """Writes the folder, of up to `pieces` pieces of 2 * events real events a patient.

    Pieces of one real patient are all held out from training, or none is.
    Returns {patient: whether it has the cause}.
    """
    dataset = read_meds(source)
    rng = np.random.default_rng(seed)
    codes, rows, planted = dataset.vocabulary.tokens, [], {}
    free = {out: _numbers(out) for out in (False, True)}
    for index, person in enumerate(dataset.subject_ids):
        own = slice(int(dataset.offsets[index]), int(dataset.offsets[index + 1]))
        ids, times, values = dataset.token_ids[own], dataset.times[own], dataset.values[own]
        timed = (times != NO_TIME) & (ids != (codes.index(BIRTH) if BIRTH in codes else -1))
        at = np.flatnonzero(timed)
        starts = range(0, len(at) - 2 * events + 1, 2 * events)[:pieces]
        for start in starts:
            piece = at[start : start + 2 * events]
            seen = int(np.searchsorted(times[piece], times[piece[events]]))  # before the cut
            if seen < events // 2:
                continue
            for has_cause in (False, True):
                number = next(free[is_held_out(int(person), HELD_OUT)])
                lines = [(number, int(times[i]), codes[ids[i]], _value(values[i])) for i in piece]
                if has_cause:
                    place = int(rng.integers(seen))
                    lines.insert(place, (number, lines[place][1], CAUSE, None))
                    lines.append((number, lines[-1][1], OUTCOME, None))
                planted[number] = has_cause
                rows += lines
    write_events(root, rows)
    return planted


def _numbers(held_out: bool):
    """Yields numbers of patients that are held out, or that are not."""
    number = 0
    while True:
        number += 1
        if is_held_out(number, HELD_OUT) == held_out:
            yield number


def _value(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
