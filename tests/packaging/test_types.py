"""What type checkers learn of the public names."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import stubs
from places import ROOT

USES = """
import torch
import clinattn

q = torch.randn(1, 2, 5, 8)
reveal_type(clinattn.fused_attention(q, q, q))
reveal_type(clinattn.fused_attention(q, q, q, window=(3, None), return_lse=True))
cu_seqlens = torch.tensor([0, 5])
reveal_type(clinattn.fused_attention_varlen(q[0], q[0], q[0], cu_seqlens, return_lse=False))
reveal_type(clinattn.replace_attention(torch.nn.Linear(2, 2)).replaced[0].name)
clinattn.fused_attention(q, q, q, windows=3)
"""
TENSOR = "torch._tensor.Tensor"
EXPECTED = (
    f'Revealed type is "{TENSOR}"', f'Revealed type is "tuple[{TENSOR}, {TENSOR}]"',
    f'Revealed type is "{TENSOR}"', 'Revealed type is "str"', "Unexpected keyword argument",
)  # fmt: skip


def test_the_stub_is_that_of_the_functions():
    assert stubs.PATH.read_text() == stubs.stub() + "\n", "run python tests/lib/stubs.py"


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_type_checker_knows_what_is_returned(tmp_path):
    shutil.copytree(ROOT / "clinattn", tmp_path / "clinattn", symlinks=True)
    (tmp_path / "uses.py").write_text(USES)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "uses.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout.replace("builtins.", "").splitlines()
    found = [line for line in said if line.startswith("uses.py:")]
    assert len(found) >= len(EXPECTED), done.stdout + done.stderr
    for expected, line in zip(EXPECTED, found, strict=False):
        assert expected in line, done.stdout
