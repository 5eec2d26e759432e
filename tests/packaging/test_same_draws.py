"""Cases that hypothesis draws do not depend on what else is loaded."""

import importlib.util
import sys

import hypothesis
from hypothesis import Phase, settings
from hypothesis import strategies as st


def drawn():
    found = []

    @hypothesis.seed(3)
    @settings(database=None, deadline=None, phases=[Phase.generate], max_examples=60)
    @hypothesis.given(st.integers(0, 10_000))
    def run(number):
        found.append(number)

    run()
    return found


def test_draws_do_not_depend_on_modules(tmp_path, monkeypatch):
    before = drawn()
    path = tmp_path / "of_many_numbers.py"
    path.write_text(f"NUMBERS = {list(range(1234, 1334))}\n")
    spec = importlib.util.spec_from_file_location("of_many_numbers", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "of_many_numbers", module)
    spec.loader.exec_module(module)
    assert drawn() == before
