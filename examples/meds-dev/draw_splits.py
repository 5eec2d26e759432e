"""Copies a MEDS folder with its patients drawn anew: 6 of 10 train, 1 tuning, 3 held out.

For data without held-out patients, such as a demo: draw_splits.py FROM TO.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

source, target = map(Path, sys.argv[1:3])
files = sorted((source / "data").rglob("*.parquet"))
events = pa.concat_tables([pq.read_table(path) for path in files])
drawn = np.random.default_rng(0).permutation(np.unique(events["subject_id"]))
tenth = len(drawn) // 10
splits = dict(
    zip(("tuning", "held_out", "train"), np.split(drawn, [tenth, 4 * tenth]), strict=True)
)
for name, subjects in splits.items():
    (target / "data" / name).mkdir(parents=True)
    chosen = events.filter(pc.is_in(events["subject_id"], pa.array(subjects)))
    pq.write_table(chosen, target / "data" / name / "0.parquet")
shutil.copytree(source / "metadata", target / "metadata")
rows = [(int(subject), name) for name, subjects in splits.items() for subject in subjects]
listed = pa.table(dict(zip(("subject_id", "split"), zip(*rows, strict=True), strict=True)))
pq.write_table(listed, target / "metadata" / "subject_splits.parquet")
print(*(f"{name} {len(subjects)}" for name, subjects in splits.items()))
