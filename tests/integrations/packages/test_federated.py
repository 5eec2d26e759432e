"""examples/federated/: both simulators give the weights of a plain loop of FedAvg, to the bit."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from places import ROOT

for package in ("pyarrow", "sklearn"):
    pytest.importorskip(package)

from patients import write_events, write_patients, write_splits  # noqa: E402

from clinattn.training.checkpoint import checkpoints, load_model  # noqa: E402
from clinattn.workloads import SPECIAL_TOKENS  # noqa: E402

HERE = ROOT / "examples" / "federated"
sys.path.insert(0, str(HERE))
from consortium import Plan, average, vocabulary, weights_of  # noqa: E402
from hospital import Hospital  # noqa: E402

PLAN = Plan(
    "ALARM*", hospitals=3, rounds=2, max_tokens=32, batch_tokens=256, hidden_size=16, num_layers=1
)
SIZES = {"site-1": 14, "site-2": 40, "site-3": 23}
FRAMEWORKS = {"nvflare": ("nvflare",), "flower": ("flwr", "ray")}


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """plan.json and three hospitals of unequal size."""
    root = tmp_path_factory.mktemp("federation")
    PLAN.write(root / "plan.json")
    for seed, (name, patients) in enumerate(SIZES.items()):
        write_patients(root / name, patients, seed)
    return root


@pytest.fixture(scope="module")
def plain(federation, tmp_path_factory):
    """Tokens and weights of FedAvg as a loop, whose hospitals are opened anew in each round."""
    counts = [Hospital(federation / name, PLAN, "unused").counts() for name in SIZES]
    tokens = vocabulary(counts)
    weights = weights_of(PLAN.model(tokens))
    for number in range(PLAN.rounds):
        sums, total, done = {}, 0, []
        for name in SIZES:
            output = tmp_path_factory.mktemp(name)
            done.append(Hospital(federation / name, PLAN, output).join(tokens))
        done = [hospital.train(number, weights) for hospital in done]
        total = sum(part.tokens for part in done)
        for part in done:
            for name, own in part.weights.items():
                sums[name] = sums.get(name, 0) + own * np.float32(part.tokens / total)
        weights = sums
    return tokens, weights


def simulated(framework, data, output):
    # as a user runs it: with the modules beside it, which the runner of tests keeps from a program
    env = {key: x for key, x in os.environ.items() if key != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, str(HERE / f"{framework}_simulation.py"), str(data), str(output)],
        cwd=output,
        env=env | {"OMP_NUM_THREADS": "1", "FLWR_HOME": str(output / "flower")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def needs(framework):
    for package in FRAMEWORKS[framework]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_simulator_gives_the_bits_of_a_plain_loop(framework, federation, plain, tmp_path):
    needs(framework)
    done = simulated(framework, federation, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    tokens, weights = plain
    found, result = (
        np.load(tmp_path / "weights.npz"),
        json.loads((tmp_path / "result.json").read_text()),
    )
    assert result["tokens"] == tokens and list(result["auprc"]) == list(SIZES)
    assert set(result["epsilon"].values()) == {0.0}
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(found[name], weight, name)
    for site in SIZES:
        model, saved = load_model(checkpoints(tmp_path / site)[-1])
        assert saved["tokens"] == tuple(tokens)
        for name, weight in weights_of(model).items():
            np.testing.assert_array_equal(weight, weights[name], name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_hospital_that_fails_ends_the_run(framework, federation, tmp_path):
    """A missing hospital ends the run: the mean of the others is another model."""
    needs(framework)
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    output.mkdir()
    for name in ("plan.json", "site-1", "site-2"):
        (data / name).symlink_to(federation / name)
    done = simulated(framework, data, output)
    assert done.returncode != 0 and not (output / "weights.npz").exists()
    assert "site-3" in done.stdout + done.stderr


def test_weights_of_a_round_follow_from_its_arguments(federation, plain, tmp_path):
    """Not from the rounds before it in the same process; and another round has other draws."""
    tokens, weights = plain
    hospital = Hospital(federation / "site-2", PLAN, tmp_path).join(tokens)
    first, other, again = (hospital.train(number, weights) for number in (0, 1, 0))
    assert first.tokens == again.tokens > 0
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(weight, again.weights[name], name)
    assert any((x != other.weights[name]).any() for name, x in first.weights.items())


def test_a_mean_is_weighted_by_tokens(plain):
    from consortium import Trained

    parts = [Trained({"w": np.full(3, x, np.float32)}, n, 0.0) for x, n in ((1, 30), (5, 10))]
    np.testing.assert_array_equal(average(parts)["w"], np.full(3, 2, np.float32))


def test_a_code_of_few_patients_is_not_told(tmp_path):
    """Patients are counted, not events, and of those to evaluate nothing is told."""
    rows = []
    for patient in range(12):
        codes = ["A", "B"] * 8 + ["ALARM"] * (patient % 2) + ["RARE"] * (9 if patient < 2 else 0)
        codes = ["THREE"] * (patient < 3) + (["TUNING"] if patient > 8 else []) + codes
        rows += [(patient, i, code) for i, code in enumerate(codes)]
    write_events(tmp_path, rows)
    write_splits(tmp_path, {p: "tuning" if p > 8 else "train" for p in range(12)})
    counts = Hospital(tmp_path, replace(PLAN, max_tokens=64), "unused").counts()
    assert counts["THREE"] == 3 and counts["A"] == 9
    assert not {"RARE", "TUNING"} & counts.keys()


@pytest.mark.parametrize("least, told", [(2, True), (3, False)])
def test_an_auprc_of_few_patients_is_not_told(least, told, tmp_path):
    rows = [(p, i, code) for p in range(12) for i, code in enumerate("AB" * 8)]
    rows += [(p, 16, "ALARM") for p in range(0, 12, 2)]
    write_events(tmp_path, sorted(rows))
    write_splits(tmp_path, {p: "tuning" if p > 7 else "train" for p in range(12)})
    plan = replace(PLAN, least=least)
    hospital = Hospital(tmp_path, plan, tmp_path / "output").join([*SPECIAL_TOKENS, "A", "B"])
    auprc = hospital.finish(weights_of(hospital.trainer.model))
    assert (0 < auprc <= 1) if told else np.isnan(auprc)


@pytest.mark.unpoisoned
@pytest.mark.filterwarnings("ignore")
def test_privacy_is_spent_by_rounds(federation, plain, tmp_path):
    pytest.importorskip("opacus")
    tokens, weights = plain
    private = replace(PLAN, noise=1.0)
    hospital = Hospital(federation / "site-2", private, tmp_path).join(tokens)
    done = [hospital.train(number, weights) for number in range(private.rounds)]
    assert 0 < done[0].epsilon < done[1].epsilon
    restarted = Hospital(federation / "site-2", private, tmp_path / "again").join(tokens)
    again = restarted.train(1, weights)
    assert again.epsilon == done[1].epsilon
    # the noise is of no seed that others know
    assert any((x != done[1].weights[name]).any() for name, x in again.weights.items())
    hospital.finish(weights)
    privacy = load_model(checkpoints(tmp_path)[-1])[1]["privacy"]
    assert privacy["epsilon"] == done[1].epsilon and privacy["unit"] == "patient"
    with pytest.raises(ValueError, match="cuts=2: expected 1 with noise"):
        Hospital(federation / "site-2", replace(private, cuts=2), tmp_path)


@pytest.mark.parametrize("path", sorted(HERE.glob("*.py")), ids=lambda path: path.stem)
def test_a_program_is_short_and_explains_itself(path):
    """A client and its coordinator are under eighty lines each."""
    source = path.read_text()
    framework = path.stem.partition("_")[0] in FRAMEWORKS
    assert len(source.splitlines()) < (80 if framework else 120)
    assert len(ast.get_docstring(ast.parse(source))) > 60
