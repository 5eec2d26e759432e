"""Settings that every test runs under.

tests/lib, and never the root of the repository, is put on sys.path: test modules share code by
`from support import ...` and `from cases import ...` (pytest's importlib mode adds nothing itself).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "lib"))

import fresh_memory  # noqa: E402
import pytest  # noqa: E402
import same_draws  # noqa: E402, F401
import seconds  # noqa: E402
import tiers  # noqa: E402
import torch  # noqa: E402
import yardstick  # noqa: E402
from failures import Failures  # noqa: E402
from places import BENCH, TESTS  # noqa: E402

fresh_memory.fill_with_nan()

# Kernels are either interpreted or compiled in a process.
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = [str(x) for x in TESTS.glob("*/") if x.name != "triton"]
    collect_ignore += [str(x) for x in (TESTS / "triton").glob("*.py")]
else:
    collect_ignore = [str(TESTS / "triton" / "interpreted")]


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
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def engines_on_the_path():
    """Modules of bench/models/engines can be imported by name."""
    paths = [str(BENCH / "models"), str(BENCH)]
    sys.path[:0] = paths
    yield
    for path in paths:
        sys.path.remove(path)


@pytest.fixture
def any_size(monkeypatch):
    """Compiled linear layers serve any size on AMX, too, where few rows are torch's."""
    from clinattn.encoder import linear_op

    monkeypatch.setattr(linear_op, "AMX_ROWS", 1)
    monkeypatch.setattr(linear_op, "AMX_COLUMNS", 1)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_presets(monkeypatch):
    """Encoders of width 32, with dropout, in place of the presets."""
    from runs import SMALL_PRESETS

    from clinattn.encoder import PRESETS

    for name, config in SMALL_PRESETS.items():
        monkeypatch.setitem(PRESETS, name, config)


def pytest_configure(config):
    config.pluginmanager.register(Failures(config))
    for name in ("fast", "device", "slow", "timed"):
        config.addinivalue_line("markers", f"{name}: the tier, by folder (tests/lib/tiers.py)")
    config.addinivalue_line("markers", "unpoisoned: torch.empty is left as it is (compilers)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(tiers.tier(item.path))
        if item.path.is_relative_to(TESTS / "integrations" / "packages"):
            item.add_marker("integrations")
    items[:] = yardstick.beside_each_other(items)
    if os.environ.get("CLINATTN_TESTS") == "sample":
        kept = tiers.sampled(items)
        config.hook.pytest_deselected(items=[x for x in items if x not in set(kept)])
        items[:] = kept


def pytest_terminal_summary(terminalreporter):
    """The table of seconds by file, or a file of them for who runs several sessions."""
    reports = [x for found in terminalreporter.stats.values() for x in found if hasattr(x, "when")]
    found = seconds.by_file(reports)
    if path := os.environ.get("CLINATTN_SECONDS"):
        Path(path).write_text(json.dumps(found))
    elif found:
        terminalreporter.write_line(seconds.table(found))
