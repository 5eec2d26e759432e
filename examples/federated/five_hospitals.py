"""Five hospitals of unequal size from one MEDS folder, and patients to test on.

Each hospital is a MEDS folder of its own, with a patient for tuning; `all` has the patients that
they train on, and as its tuning those to test on, a fifth, who are in no hospital.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from consortium import Plan

from clinattn.workloads.seeds import derived_seed

FOLDS, SHARES = 5, (0.4, 0.25, 0.15, 0.12, 0.08)


def divide(events: pa.Table, root: Path, plan: Plan, fold: int) -> None:
    """Writes plan.json, site-1 to site-5 and all. Over the folds, each is tested on once."""
    drawn = lambda name, x: derived_seed(name, plan.seed, x)
    people = sorted(pc.unique(events["subject_id"]).to_pylist(), key=lambda x: drawn("fold", x))
    test, rest = people[fold::FOLDS], [x for i, x in enumerate(people) if i % FOLDS != fold]
    rest.sort(key=lambda x: drawn("hospital", x))
    ends = (np.cumsum(SHARES) * len(rest)).round().astype(int)
    trained = []
    for number, own in enumerate(np.split(rest, ends[:-1]), 1):
        _write(events, root / f"site-{number}", tuning=own[:1].tolist(), train=own[1:].tolist())
        trained += own[1:].tolist()
    _write(events, root / "all", tuning=test, train=trained)
    plan.write(root / "plan.json")


def _write(events: pa.Table, folder: Path, **splits: list[int]) -> None:
    """Writes a MEDS folder of the subjects of these splits."""
    listed = [(subject, split) for split, subjects in splits.items() for subject in subjects]
    subject, split = zip(*listed, strict=True)
    for name in ("data", "metadata"):
        (folder / name).mkdir(parents=True)
    own = events.filter(pc.is_in(events["subject_id"], pa.array(subject)))
    pq.write_table(own, folder / "data" / "0.parquet")
    table = pa.table({"subject_id": subject, "split": split})
    pq.write_table(table, folder / "metadata" / "subject_splits.parquet")
