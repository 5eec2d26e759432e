"""Programs of clinattn export, in processes of their own: with clinattn's ops, and without it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

for package in ("rich", "typer"):
    pytest.importorskip(package)

from made_checkpoints import write_made  # noqa: E402
from runs import SMALL  # noqa: E402
from support import assert_close  # noqa: E402

from clinattn.encoder import EncoderConfig, SequenceClassifier, linear  # noqa: E402
from clinattn.tools.exporting.export import export  # noqa: E402
from clinattn.tools.exporting.program import extras_of, ours_in, packs  # noqa: E402
from clinattn.tools.exporting.settings import ExportSettings  # noqa: E402
from clinattn.training.checkpoint import load_model  # noqa: E402

# Compilers allocate through torch.empty themselves.
pytestmark = pytest.mark.unpoisoned

SHAPE = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "num_layers": 2}
TWO = replace(SMALL, num_layers=2, windows=(None, 8))
LONGFORMER = EncoderConfig.preset(
    "clinical-longformer", vocab_size=60, windows=(4, 6), max_positions=100, **SHAPE
)
CASES = {
    "modernbert": (TWO, "classify"),
    "times, values, mean": (
        replace(TWO, positions="rotary_time", numeric_values=True, pooling="mean"),
        "classify",
    ),
    "causal": (replace(TWO, causal=True, pooling="last"), "classify"),
    "longformer": (LONGFORMER, "classify"),
    "masked": (TWO, "mlm"),
}
TRIED = (9,), (7, 3, 40), (33, 1, 5, 20)

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("clinattn", "triton"):
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""
RUN = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
given = torch.load(sys.argv[2])
torch.save([program(*batch) for batch in given], sys.argv[3])
assert ("clinattn" in sys.modules) == (len(sys.argv) > 4)
"""


def batches(config, plain):
    """For each of TRIED the arguments of a program, and those of the model."""
    generator = torch.Generator().manual_seed(3)
    for lengths in TRIED:
        ids = [torch.randint(5, 45, (n,), generator=generator) for n in lengths]
        own = {
            "positions": [torch.rand(n, generator=generator).double().cumsum(0) for n in lengths],
            "values": [torch.randn(n, generator=generator) for n in lengths],
        }
        ends = torch.tensor((0, *lengths)).cumsum(0).int()
        packed = {name: torch.cat(own[name]) for name in extras_of(config)}
        model = (torch.cat(ids), {"cu_seqlens": ends, **packed})
        if packs(config, plain):
            yield (model[0], ends, *packed.values()), model
            continue
        columns = [ids, *(own[name] for name in extras_of(config))]
        padded = [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in columns]
        yield (padded[0], torch.tensor(lengths), *padded[1:]), model


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_a_program_is_the_model_in_another_process(case, plain, tmp_path, monkeypatch):
    config, task = CASES[case]
    path = write_made(tmp_path / "run", config, task)
    settings = ExportSettings(str(path), torch_export=tmp_path / "m.pt2", plain=plain)
    (said,) = export(settings, lambda *_: None)
    assert ("torch alone" in said) == plain
    given = list(batches(config, plain))
    torch.save([arguments for arguments, _ in given], tmp_path / "given.pt")
    script = BLOCK + RUN if plain else "import clinattn\n" + RUN
    places = [str(tmp_path / name) for name in ("m.pt2", "given.pt", "found.pt")]
    done = subprocess.run(
        [sys.executable, "-c", script, *places, *([] if plain else ["ours"])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    program = torch.export.load(tmp_path / "m.pt2")
    assert bool(ours_in(program)) == (not plain)
    model = load_model(path)[0]
    exact = load_model(path)[0].double()
    monkeypatch.setattr(linear, "_form", lambda *call: None)  # torch's own linear layers
    for (arguments, (ids, words)), found in zip(given, torch.load(places[2]), strict=True):
        if not packs(config, plain) and not isinstance(model, SequenceClassifier):
            real = torch.arange(arguments[0].shape[1]) < arguments[1][:, None]
            found = found[real]
        doubled = {k: x.double() if k == "values" else x for k, x in words.items()}
        with torch.no_grad():
            naive, truth = (m(ids, **w).logits for m, w in ((model, words), (exact, doubled)))
        assert_close(case, found, truth, naive)
