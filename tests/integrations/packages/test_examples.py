"""Every example runs from a fresh clone, in a process of its own, and shows what it says."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from places import ROOT

from clinattn.training.checkpoint import checkpoints, load_model

EXAMPLES = ROOT / "examples"
PACKAGES = {
    "captum_embeddings": ("captum",),
    "finetune_bert": ("transformers", "accelerate"),
    "meds_eic_ar": ("transformers",),
    "packed_accelerate": ("transformers", "accelerate"),
    "packed_lightning": ("transformers", "lightning"),
    "packed_trainer": ("transformers", "accelerate"),
    "private_training": ("opacus",),
}


def numbers(name, output):
    """Returns the numbers after a name, as in "loss 0.25" or "'loss': '0.25'"."""
    return [float(x) for x in re.findall(rf"\b{name}[': ]+(\d+\.?\d*(?:e-?\d+)?)", output)]


def falls(output):
    losses = numbers("loss", output)
    return len(losses) > 2 and losses[-1] < 0.3 * losses[0]


def replaces(output):
    """The report of replace_attention comes before the losses."""
    return int(re.search(r"(\d+) attention modules? replaced", output)[1]) > 0 and falls(output)


def forgets_the_distant(output):
    decay = numbers("decay", output)
    return falls(output) and decay[-1] > 2 * decay[0]


def learns_in_private(output):
    """Nine of ten labels follow the rule of example_patients.py: the best AUROC is about 0.9."""
    epsilon = numbers("epsilon", output)
    return epsilon == sorted(epsilon) and epsilon[-1] < 8 and numbers("auroc", output)[-1] > 0.8


def teaches(output):
    """The student is as good as its teacher, far smaller and faster, and poor without it."""
    rows = [
        [float(x.replace(",", "")) for x in re.findall(r"\d[\d,.]*", line)]
        for line in output.splitlines()[1:]
    ]
    (teacher, size, _), (student, small, _), (scratch, same, _) = rows
    return min(teacher, student) > 0.85 > scratch + 0.1 and small == same < size / 10


def sorts_notes(output):
    return replaces(output) and numbers("accuracy", output)[-1] > 0.95


def agrees(output):
    eager, compiled = (numbers(name, output) for name in ("eager", "compiled"))
    assert set(numbers("graphs", output)) == {1}
    return len(eager) == 3 and eager == pytest.approx(compiled, abs=1e-4)


def differs_by_rounding(output):
    (difference,) = numbers("difference", output)
    return 0 < difference < 1e-5


def keeps_apart(output):
    """The gradient of one patient's output is 0 in the other, and not in its own."""
    (other,), (own,) = numbers("other patient", output), numbers("own", output)
    return other == 0 < own


def finds_the_code(output):
    """Both ways give the same shares, and most of them to the code that labels came from."""
    shares = [numbers(name, output) for name in ("captum", "clinattn")]
    return shares[0] == pytest.approx(shares[1], abs=0.01) and min(shares[0]) > 0.3


SHOWS = {
    "captum_embeddings": finds_the_code,
    "cehr_gpt": keeps_apart,
    "compile": agrees,
    "distillation": teaches,
    "encoder_decoder": replaces,
    "ethos_ares": falls,
    "femr": differs_by_rounding,
    "finetune_bert": replaces,
    "meds_eic_ar": falls,
    "packed_accelerate": replaces,
    "packed_lightning": replaces,
    "packed_trainer": sorts_notes,
    "private_training": learns_in_private,
    "self_attention": forgets_the_distant,
    "split_sequence": falls,
}


def spent(folder):
    """The checkpoint and the last row of the metrics hold the same facts, and load_model reads."""
    row = json.loads((folder / "private" / "metrics.jsonl").read_text().splitlines()[-1])
    (path,) = checkpoints(folder / "private")
    saved = load_model(path)[1]
    assert saved["privacy"].items() <= row.items() and saved["step"] == row["step"]
    return 0 < saved["privacy"]["epsilon"] < 8 and saved["privacy"]["unit"] == "patient"


LEAVES = {"private_training": spent}
LINES = {"distillation": 60, "private_training": 60, "split_sequence": 60}  # of the others: 40
DATA = {"example_patients"}  # modules that others import


def test_there_is_a_check_for_each():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWS) | DATA


@pytest.mark.parametrize("name", SHOWS)
def test_example_is_short_and_explains_itself(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) < LINES.get(name, 40)
    assert len(ast.get_docstring(ast.parse(source))) > 80


@pytest.mark.parametrize("name", SHOWS)
def test_example_shows_what_it_says(name, tmp_path):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    # as a user runs it: with the modules beside it, which the runner of tests keeps from a program
    env = {key: x for key, x in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SHOWS[name](done.stdout), done.stdout
    assert name not in LEAVES or LEAVES[name](tmp_path)
