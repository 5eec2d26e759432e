"""Costs of clinattn at the start of a program: import after torch's, first call, and the build.

    pytest bench/suites/bench_startup.py --benchmark-only --sizes large

Every round is an interpreter of its own. The time in the table is that of the whole process; those
of the parts, measured inside it, are in extra_info. The build, of the CPU kernels alone, is timed
at large sizes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from base_tree import build
from clinattn.tools.benchmark.measure import quartiles

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md")
SOURCES += ("build_support", "csrc", "kernels", "clinattn")
ROUNDS = {"small": 3, "large": 15}
PROGRAMS = {
    "torch": """
import json, time
began = time.perf_counter()
import torch
print(json.dumps({"import torch": time.perf_counter() - began}))
""",
    "clinattn": """
import json, time
began = time.perf_counter()
import torch
torch_there = time.perf_counter()
import clinattn
there = time.perf_counter()
q = torch.randn(1, 2, 65, 32)
ready = time.perf_counter()
first = clinattn.fused_attention(q, q, q)
called = time.perf_counter()
again = clinattn.fused_attention(q, q, q)
done = time.perf_counter()
truth = torch.nn.functional.scaled_dot_product_attention(*[q.double()] * 3)
assert (first - truth).abs().max() < 1e-5 and torch.equal(first, again)
print(json.dumps({"import torch": torch_there - began, "import clinattn": there - torch_there,
                  "first call": called - ready, "second call": done - called}))
""",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_startup(benchmark, sizes, program):
    parts: list[dict[str, float]] = []

    def start() -> None:
        command = [sys.executable, "-c", PROGRAMS[program]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        parts.append(json.loads(done.stdout))

    benchmark.group = "startup"
    # The first start, which fills the page cache and is checked, is not counted.
    benchmark.pedantic(start, rounds=ROUNDS[sizes], warmup_rounds=1)
    counted = parts[1:] or parts
    benchmark.extra_info |= {
        "kind": "startup",
        "way": program,
        "seconds": {name: quartiles([part[name] for part in counted]) for name in counted[0]},
    }


def test_build(benchmark, sizes, tmp_path):
    """Times a build from nothing, in a copy of this tree, as one round: a build takes a minute."""
    if sizes != "large":
        pytest.skip("the build is timed with --sizes large")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=unbuilt)
        else:
            shutil.copy(ROOT / name, tmp_path)
    benchmark.group = "build"
    benchmark.pedantic(build, args=(tmp_path, "this tree"), rounds=1)
    assert list(tmp_path.glob("clinattn/*.so"))
    if benchmark.enabled:
        seconds = {"build": quartiles(benchmark.stats.stats.data)}
        benchmark.extra_info |= {"kind": "startup", "way": "build", "seconds": seconds}
