"""The cost of federation: a model of all data, federated averaging, and hospitals alone.

Arguments: a MEDS folder, an empty folder for hospitals and models (which then has the data: remove
it), and in JSON seeds=, folds=, frameworks= or fields of a Plan, such as noise=1.0.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from consortium import Plan, Weights, average, vocabulary, weights_of
from five_hospitals import FOLDS, SHARES, divide
from hospital import Hospital
from sklearn.metrics import average_precision_score, roc_auc_score

Model = tuple[list[str], Weights]  # tokens and weights


def alone(folder: Path, plan: Plan, output: Path) -> Model:
    """Trains a hospital by itself, for as many passes as a federation."""
    hospital = Hospital(folder, plan, output)
    tokens = vocabulary([hospital.counts()])
    trainer = hospital.join(tokens).trainer
    trainer.load_weights(plan.model(tokens).state_dict())
    trainer.advance(plan.rounds * hospital.steps)
    return tokens, weights_of(trainer.model)


def averaged(hospitals: Sequence[Hospital], plan: Plan) -> Model:
    """Federated averaging without a framework."""
    tokens = vocabulary(hospital.counts() for hospital in hospitals)
    weights = weights_of(plan.model(tokens))
    for number in range(plan.rounds):
        weights = average([x.join(tokens).train(number, weights) for x in hospitals])
    return tokens, weights


def simulated(framework: str, root: Path, output: Path) -> Model:
    """Federated averaging in the simulator of a framework."""
    script = Path(__file__).with_name(f"{framework}_simulation.py")
    with (root / f"{framework}.log").open("w") as log:
        command = [sys.executable, str(script), str(root), str(output)]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    result = json.loads((output / "result.json").read_text())
    print(f"{framework}: epsilon {result['epsilon']}, AUPRC of their own {result['auprc']}")
    return result["tokens"], dict(np.load(output / "weights.npz"))


def models(root: Path, plan: Plan, frameworks: list[str]) -> Iterator[tuple[str, Model]]:
    names, out = [f"site-{number}" for number in range(1, len(SHARES) + 1)], root / "out"
    yield "all data together", alone(root / "all", plan, out / "all")
    loop = averaged([Hospital(root / name, plan, out / "loop" / name) for name in names], plan)
    yield "FedAvg", loop
    for framework in frameworks:
        tokens, weights = simulated(framework, root, out / framework)
        same = all(np.array_equal(weights[name], x) for name, x in loop[1].items())
        print(f"{framework}: {'the same bits as' if same else 'other bits than'} a loop")
        yield f"FedAvg, {framework}", (tokens, weights)
    for name in names:
        yield f"{name} alone", alone(root / name, plan, out / "alone" / name)


def main(source: str, root: str, *given: str) -> None:
    said = {name: json.loads(value) for name, value in (x.split("=", 1) for x in given)}
    seeds, folds = said.pop("seeds", [0]), said.pop("folds", FOLDS)
    frameworks = said.pop("frameworks", ["nvflare", "flower"])
    plan = Plan(**{"label_code": "ICU_*", "cuts": 16, "rounds": 6} | said)
    paths = sorted(Path(source, "data").rglob("*.parquet"))
    events = pa.concat_tables([pq.read_table(path) for path in paths])
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed, fold in ((seed, fold) for seed in seeds for fold in range(folds)):
        own, place = replace(plan, seed=seed), Path(root, f"{seed}-{fold}")
        divide(events, place, own, fold)
        judge = Hospital(place / "all", own, place / "out" / "judge")
        for name, (tokens, weights) in models(place, own, frameworks):
            labels, scores = judge.join(tokens).scores(weights)
            figures = average_precision_score(labels, scores), roc_auc_score(labels, scores)
            found.setdefault(name, []).append((*figures, labels.mean()))
            print(seed, fold, name, *(f"{x:.3f}" for x in found[name][-1]), flush=True)
    print("| model | AUPRC, and its range over seeds | AUROC |\n|---|--:|--:|")
    for name, rows in found.items():
        ap, auc, base = np.reshape(rows, (len(seeds), folds, 3)).mean(1).T
        print(f"| {name} | {ap.mean():.3f} ({ap.min():.3f} to {ap.max():.3f}) | {auc.mean():.3f} |")
    print(f"| the share of positives | {base.mean():.3f} | 0.5 |")


if __name__ == "__main__":
    main(*sys.argv[1:])
