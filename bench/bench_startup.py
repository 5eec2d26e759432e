"""What clinattn adds to the start of a program: its import after torch's, and its first call.

    pytest bench/bench_startup.py --benchmark-only

Every round is an interpreter of its own. The time in the table is that of the whole process; those
of the parts, measured inside it, are in extra_info.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from clinattn.benchmark.measure import quartiles

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
    # The first one, which fills the page cache and is checked, is not counted.
    benchmark.pedantic(start, rounds=ROUNDS[sizes], warmup_rounds=1)
    counted = parts[1:] or parts
    benchmark.extra_info |= {
        "kind": "startup",
        "way": program,
        "seconds": {name: quartiles([part[name] for part in counted]) for name in counted[0]},
    }
