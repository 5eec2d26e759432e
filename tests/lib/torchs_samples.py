"""torch's own table of inputs of scaled_dot_product_attention.

    python tests/lib/torchs_samples.py FILE     writes them: [(inputs, keyword arguments), ...]

In a process of its own: the module that has the table turns off setters of torch.backends for the
whole process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "nn.functional.scaled_dot_product_attention"


class Sample(NamedTuple):
    inputs: list[Tensor]
    words: dict[str, Any]


def samples(dropout: bool = False) -> list[Sample]:
    """Those with dropout, or those without; leaves that need gradients, in fp64."""
    return [x for x in _all() if bool(x.words.get("dropout_p")) == dropout]


@cache
def _all() -> list[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.pt"
        subprocess.run([sys.executable, __file__, str(path)], check=True)
        return [Sample(*x) for x in torch.load(path)]


def write(path: str) -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    operator = next(x for x in op_db if x.name == NAME)
    torch.manual_seed(0)
    found = {}
    for x in operator.sample_inputs("cpu", torch.float64, requires_grad=True):
        inputs, words = [x.input, *x.args], dict(x.kwargs)
        sizes = [y.shape for y in inputs]
        scalars = {name: y for name, y in words.items() if not isinstance(y, Tensor)}
        found[str((sizes, scalars, sorted(words)))] = inputs, words  # it names each twice
    torch.save(list(found.values()), path)


if __name__ == "__main__":
    write(sys.argv[1])
