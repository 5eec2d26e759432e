"""Tests of what other packages bring: left out, all of them, where one of these is missing."""

from importlib.util import find_spec

import pytest

NEEDED = (
    "accelerate", "all_minilm_l6_v2", "opacus", "peft", "safetensors", "simple_icd_10_cm",
    "transformers",
)  # fmt: skip

collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]


@pytest.fixture
def served():
    """Calls of the compiled layers, as replaced_models.watched_calls lists them."""
    from replaced_models import watched_calls

    with watched_calls() as seen:
        yield seen
