"""What federation costs: one model of all data, FedAvg by two frameworks, and hospitals alone.

The patients of a MEDS folder become five hospitals of unequal size and a fifth to test on, five
times, so that each patient is tested on once. Arguments: the MEDS folder, an empty folder for
hospitals and models (which then has the data: remove it), and the number of seeds.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from consortium import Plan, Weights, vocabulary, weights_of
from hospital import Hospital
from sklearn.metrics import average_precision_score, roc_auc_score

from clinattn.workloads.seeds import derived_seed

FOLDS, SHARES = 5, (0.4, 0.25, 0.15, 0.12, 0.08)
FRAMEWORKS = ("nvflare", "flower")


def write(events: pa.Table, folder: Path, **splits: list[int]) -> None:
    """Writes a MEDS folder of the subjects of these splits."""
    listed = [(subject, split) for split, subjects in splits.items() for subject in subjects]
    subject, split = zip(*listed, strict=True)
    for name in ("data", "metadata"):
        (folder / name).mkdir(parents=True)
    own = events.filter(pc.is_in(events["subject_id"], pa.array(subject)))
    pq.write_table(own, folder / "data" / "0.parquet")
    table = pa.table({"subject_id": subject, "split": split})
    pq.write_table(table, folder / "metadata" / "subject_splits.parquet")


def divided(events: pa.Table, root: Path, plan: Plan, fold: int) -> None:
    """Writes plan.json, the hospitals, and `all`: their patients, and those to test on (tuning)."""
    drawn = lambda name, x: derived_seed(name, plan.seed, x)
    people = sorted(pc.unique(events["subject_id"]).to_pylist(), key=lambda x: drawn("fold", x))
    test, rest = people[fold::FOLDS], [x for i, x in enumerate(people) if i % FOLDS != fold]
    rest.sort(key=lambda x: drawn("hospital", x))
    ends = (np.cumsum(SHARES) * len(rest)).round().astype(int)
    trained = []
    for number, own in enumerate(np.split(rest, ends[:-1]), 1):
        write(events, root / f"site-{number}", tuning=own[:1].tolist(), train=own[1:].tolist())
        trained += own[1:].tolist()
    write(events, root / "all", tuning=test, train=trained)
    plan.write(root / "plan.json")


def alone(folder: Path, plan: Plan, output: Path) -> tuple[list[str], Weights]:
    """Returns tokens and weights of a hospital that trains by itself, as many passes."""
    hospital = Hospital(folder, plan, output)
    tokens = vocabulary([hospital.counts()])
    trainer = hospital.join(tokens).trainer
    trainer.load_weights(plan.model(tokens).state_dict())
    trainer.advance(plan.rounds * hospital.steps)
    return tokens, weights_of(trainer.model)


def federated(framework: str, root: Path, output: Path) -> tuple[list[str], Weights]:
    script = Path(__file__).with_name(f"{framework}_simulation.py")
    with (root / f"{framework}.log").open("w") as log:
        command = [sys.executable, str(script), str(root), str(output)]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    tokens = json.loads((output / "result.json").read_text())["tokens"]
    return tokens, dict(np.load(output / "weights.npz"))


def models(root: Path, plan: Plan) -> Iterator[tuple[str, list[str], Weights]]:
    yield "all data together", *alone(root / "all", plan, root / "out" / "all")
    for framework in FRAMEWORKS:
        yield f"FedAvg, {framework}", *federated(framework, root, root / "out" / framework)
    for number in range(1, plan.hospitals + 1):
        name = f"site-{number}"
        yield f"{name} alone", *alone(root / name, plan, root / "out" / "alone" / name)


def main(source: str, root: str, seeds: str = "3") -> None:
    paths = sorted(Path(source, "data").rglob("*.parquet"))
    events = pa.concat_tables([pq.read_table(path) for path in paths])
    plan = Plan("ICU_*", cuts=16, rounds=6)
    found: dict[str, np.ndarray] = {}
    for seed in range(int(seeds)):
        for fold in range(FOLDS):
            own, place = replace(plan, seed=seed), Path(root, f"{seed}-{fold}")
            divided(events, place, own, fold)
            judge = Hospital(place / "all", own, place / "out" / "judge")
            for name, tokens, weights in models(place, own):
                labels, scores = judge.join(tokens).scores(weights)
                figures = average_precision_score(labels, scores), roc_auc_score(labels, scores)
                rows = found.setdefault(name, np.full((int(seeds), FOLDS, 3), np.nan))
                rows[seed, fold] = *figures, labels.mean()
                print(seed, fold, name, *(f"{x:.3f}" for x in rows[seed, fold]), flush=True)
    for name, rows in found.items():
        ap, auc, base = rows.mean(1).T
        print(f"| {name} | {ap.mean():.3f} ({ap.min():.3f} to {ap.max():.3f}) | {auc.mean():.3f} |")
    print(f"share of positives {base.mean():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
