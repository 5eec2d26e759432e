"""torch.export and AOTInductor: the ops survive, programs are saved, and load where they are known.

The ops are registered by `import clinattn`; a process without it cannot run an exported encoder.
"""

import subprocess
import sys

import pytest
import torch
from encoders import BERT, MODERN, seeded
from torch import nn
from torch.export import Dim

from clinattn.encoder import Encoder, linear

# Compilers allocate through torch.empty themselves.
pytestmark = pytest.mark.unpoisoned

# BERT's learned positions end at 64, and T stands in for the longest sequence.
B, N = Dim("B", max=64), Dim("N", min=2, max=64)
T, ENDS = Dim("T", min=2, max=64), Dim("ENDS", min=3, max=65)


class Padded(nn.Module):
    """Hidden states with zeros in the padding, where those of the encoder mean nothing."""

    def __init__(self, config):
        super().__init__()
        self.encoder = seeded(Encoder, config).eval()

    def forward(self, input_ids, lengths):
        hidden = self.encoder(input_ids, lengths=lengths, layout="padded")
        real = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return hidden.where(real[..., None], 0)


class Packed(Padded):
    def forward(self, input_ids, cu_seqlens):
        return self.encoder(input_ids, cu_seqlens=cu_seqlens)


def padded(*lengths):
    return torch.randint(0, MODERN.vocab_size, (len(lengths), max(lengths))), torch.tensor(lengths)


def packed(*lengths):
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    return torch.randint(0, MODERN.vocab_size, (sum(lengths),)), cu_seqlens


LAYOUTS = {
    "padded": (Padded, padded, {"input_ids": {0: B, 1: N}, "lengths": {0: B}}),
    "packed": (Packed, packed, {"input_ids": {0: T}, "cu_seqlens": {0: ENDS}}),
}
TRIED = (7, 3, 40), (1, 2), (33, 1, 5, 20)


def exported(layout, config, strict=False):
    kind, batch, shapes = LAYOUTS[layout]
    model = kind(config)
    return model, torch.export.export(model, batch(33, 9), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("config", [MODERN, BERT], ids=["modernbert", "bert"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_program_serves_every_shape(layout, config, strict, monkeypatch):
    model, program = exported(layout, config, strict)
    monkeypatch.setattr(linear, "_form", lambda *call: None)  # a program's layers are torch's
    parts = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    ops = {str(node.target) for part in parts for node in part.graph.nodes}
    assert "clinattn.attention_forward.default" in ops
    assert ("clinattn.rotary.default" in ops) == (config is MODERN)
    for lengths in TRIED:
        batch = LAYOUTS[layout][1](*lengths)
        assert torch.equal(program.module()(*batch), model(*batch))


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["exported", "compiled"])
def saved(request, tmp_path_factory):
    """(how to load it, where it is, inputs, outputs expected): a program in a file."""
    folder = tmp_path_factory.mktemp(request.param)
    model, program = exported("padded", MODERN)
    batch = padded(*TRIED[0])
    path = folder / "encoder.pt2"
    if request.param == "exported":
        load = "torch.export.load(sys.argv[1]).module()"
        torch.export.save(program, path)
    else:
        load = "torch._inductor.aoti_load_package(sys.argv[1])"
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except torch._inductor.exc.InvalidCxxCompiler as error:
            pytest.skip(f"torch.compile finds no C++ compiler: {error}")
    torch.save((batch, model(*batch).detach()), folder / "batch.pt")
    return load, path, folder / "batch.pt"


@pytest.mark.parametrize("imports", ["import sys, torch, clinattn", "import sys, torch"])
def test_a_saved_program_needs_the_package_that_has_its_ops(saved, imports):
    load, path, batch = saved
    done = run(
        f"""
{imports}
batch, expected = torch.load(sys.argv[2])
with torch.no_grad():
    actual = {load}(*batch)
torch.testing.assert_close(actual, expected)
print("equal")
""",
        *(path, batch),
    )
    if "clinattn" in imports:
        assert done.stdout == "equal\n", done.stderr
    else:
        assert done.returncode != 0
        assert "clinattn" in done.stderr
