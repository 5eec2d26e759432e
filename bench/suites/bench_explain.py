"""Explanations of a whole model beside the passes that they need anyway: time and peak memory.

    pytest bench/suites/bench_explain.py --benchmark-only --sizes large

ratio_to_peer is over the peer: the forward pass for rollout, and forward and backward to the
embeddings, as gradient times input takes it, for the methods with a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import clinattn
from clinattn.encoder import EncoderConfig, SequenceClassifier
from clinattn.tools.benchmark.measure import peak_memory

# layers, width, tokens; heads of 64
SIZES = {"small": [(2, 128, 256)], "large": [(12, 768, 512), (12, 768, 4096)]}
PEERS = {
    "rollout": "forward",
    "attingrad": "gradient_x_input",
    "relevance": "gradient_x_input",
    "attnlrp": "gradient_x_input",
}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("size", SIZES[metafunc.config.getoption("--sizes")])


@functools.lru_cache(maxsize=1)
def model_of(size: tuple[int, int, int], device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A classifier of full attention, of the shape of BERT, and one sequence."""
    layers, width, tokens = size
    shape = {"num_layers": layers, "hidden_size": width, "num_heads": width // 64}
    config = EncoderConfig.preset(
        "clinicalbert", intermediate_size=4 * width, max_positions=tokens, windows=(), **shape
    )
    torch.manual_seed(0)
    model = SequenceClassifier(config, 2).eval().to(device)
    ids = torch.randint(5, config.vocab_size, (1, tokens), device=device)
    return model, {"inputs": ids}


def work_of(method: str, size: tuple[int, int, int], device: torch.device) -> Callable[[], Any]:
    model, inputs = model_of(size, device)
    if method == "forward":
        return torch.inference_mode()(lambda: model(**inputs))
    if method == "rollout":  # of an answer whose token is known: no gradient is needed

        @torch.inference_mode()
        def rollout():
            with clinattn.explain(model) as e:
                model(**inputs)
            return e.rollout(0)

        return rollout
    return lambda: clinattn.attribute(model, inputs, 1, method)


@pytest.mark.parametrize("method", PEERS)
def test_explain(race, benchmark, device, size, method):
    work, peer = (work_of(name, size, device) for name in (method, PEERS[method]))
    layers, width, tokens = size
    scores = []
    benchmark.extra_info["peak_bytes"] = peak_memory(lambda: scores.append(work()), device)
    benchmark.extra_info["peer_peak_bytes"] = peak_memory(peer, device)
    assert bool(scores[0].isfinite().all()) and bool((scores[0] != 0).any())
    race(
        work,
        peer,
        group=f"explain {layers} layers of {width}, N{tokens}",
        tokens=tokens,
        dtype=torch.float32,
        rounds=3 if tokens > 1000 else 5,
        kind="explain",
        way=f"clinattn {method}",
    )
