"""Explanations of one token need no N x N numbers: 12 layers, 12 heads and 4,096 tokens."""

import subprocess
import sys

import pytest
from support import BACKENDS

# A process of its own, since memory that torch once had from the C library stays with it.
SCRIPT = """
import torch, clinattn
from clinattn.encoder import EncoderConfig, SequenceClassifier

torch.set_num_threads(1)
size = dict(hidden_size=96, num_layers=12, num_heads=12, intermediate_size=96, windows=())
config = EncoderConfig.preset("clinicalbert", vocab_size=50, max_positions=4096, **size)
model = SequenceClassifier(config, 2).eval()

def memory(name):
    with open("/proc/self/status") as status:
        return int(next(x for x in status if x.startswith(name)).split()[1]) // 1024

with torch.set_grad_enabled({grad}), clinattn.explain(model) as e:
    out = model(torch.randint(50, (1, 4096)))
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = memory("VmRSS")
{ask}
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("ask", ["e.rollout(0); e.topk(0)", "e.relevance(out.logits[:, 0])"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif("cpu" not in BACKENDS, reason="takes minutes by the reference")
def test_memory(ask):
    """One matrix of weights of one layer is 768 MiB, in fp32."""
    script = SCRIPT.replace("{ask}", ask).replace("{grad}", str("relevance" in ask))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100, f"{done.stdout} MiB"
