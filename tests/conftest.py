"""Settings that every test runs under.

This folder, and never the root of the repository, is put on sys.path: test modules share code by
`from support import ...` and `from cases import ...` (pytest's importlib mode adds nothing itself).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Read by the compiled kernels at their first use: outputs start as NaN, so an unwritten one shows.
os.environ.setdefault("CLINATTN_POISON_OUTPUTS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Kernels that are interpreted are not compiled.
collect_ignore = ["test_triton_aot.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []


def _poisoned(allocate):
    """`allocate`, but what it returns to clinattn is full of NaN."""

    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("clinattn") and type(out) is torch.Tensor and out.is_floating_point():
            out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """torch.empty and its like give NaN to the package; marker `unpoisoned` leaves them alone."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def bench_on_the_path():
    """Modules of bench/ can be imported by name."""
    folder = str(Path(__file__).parent.parent / "bench")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_configure(config):
    config.addinivalue_line("markers", "unpoisoned: torch.empty is left as it is (compilers)")


@pytest.fixture
def small_presets(monkeypatch):
    """Encoders of width 32, with dropout, in place of the presets."""
    from runs import SMALL_PRESETS

    from clinattn.encoder import PRESETS

    for name, config in SMALL_PRESETS.items():
        monkeypatch.setitem(PRESETS, name, config)
