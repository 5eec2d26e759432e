"""bench/models/engines: batches and their way back, NaN and errors, turns, rows, remedies."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("engines_on_the_path")
LENGTHS = (5, 1, 64, 7, 7, 30, 2)
SEQUENCES = [np.arange(1, n + 1) + 100 * i for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def batches(engines_on_the_path):
    return importlib.import_module("engines.batches")


@pytest.fixture(scope="module")
def check(engines_on_the_path):
    return importlib.import_module("engines.check")


@pytest.fixture(scope="module")
def registry(engines_on_the_path):
    return importlib.import_module("engines.registry")


@pytest.fixture(scope="module")
def timing(engines_on_the_path):
    return importlib.import_module("engines.timing")


@pytest.fixture
def row(engines_on_the_path):
    module = importlib.import_module("engines.rows")
    return module.Row(
        load="full", title="512 tokens", model="BERT base", layers=4, published_layers=12,
        kind="fp32", engine="torch", batching="padded", sequences=2, batch=2, tokens=1000,
        longest=512, padding_share=0.0, not_finite=0, error=0.0, convert_seconds=0.0,
        compile_seconds=0.5, package_bytes=1,
    )  # fmt: skip


def echo(batch):
    """Token ids as hidden states of one number, with NaN in the padding."""
    return np.where(batch.mask() if not batch.packed else True, batch.ids, np.nan)[..., None]


@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("batching", ["padded", "sorted", "packed"])
def test_outputs_come_back_in_order_and_without_padding(batches, batching, size):
    made = batches.BATCHINGS[batching](SEQUENCES, size)
    assert sum(len(x.places) for x in made) == len(SEQUENCES)
    assert max(len(x.places) for x in made) == min(size, len(SEQUENCES))
    found = batches.outputs(made, echo)
    for rows, ids in zip(found, SEQUENCES, strict=True):
        np.testing.assert_array_equal(rows[:, 0], ids)


def test_an_output_may_be_overwritten_by_the_next_batch(batches):
    """An engine may hand out its own buffer."""
    buffer = np.zeros((3, 64, 1))

    def run(batch):
        out = buffer[: batch.ids.shape[0], : batch.ids.shape[1]]
        out[:] = echo(batch)
        return out

    for made in (batches.padded(SEQUENCES, 3), batches.by_length(SEQUENCES, 3)):
        found = batches.outputs(made, run)
        assert [int(x[0, 0]) for x in found] == [int(x[0]) for x in SEQUENCES]


def test_sorted_batches_hold_similar_lengths(batches):
    made = batches.by_length(SEQUENCES, 3)
    lengths = [n for batch in made for n in batch.lengths]
    assert lengths == sorted(LENGTHS)
    shares = [batches.padding_share(x) for x in (made, batches.padded(SEQUENCES, 3))]
    assert shares[0] < shares[1]
    assert batches.padding_share(batches.packed(SEQUENCES, 3)) == 0


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_batch_comes_back_from_a_file(batches, batching, tmp_path):
    made = batches.BATCHINGS[batching](SEQUENCES, 3)[0]
    batches.save(made, tmp_path / "batch.npz")
    found = batches.load(tmp_path / "batch.npz")
    assert found.packed == made.packed and found.full == made.full
    for x, y in zip(made[:3], found[:3], strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_error_is_relative_and_of_all_tokens(check):
    truth = [np.full((3, 2), 2.0), np.full((1, 2), -2.0)]
    found = [truth[0] + 0.02, truth[1]]
    assert check.verdict(truth, truth) == (0, 0.0)
    assert check.verdict(found, truth).error == pytest.approx(0.01 * (3 / 4) ** 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_real_token_has_no_error(check, value):
    truth = [np.ones((3, 2)), np.ones((1, 2)), np.ones((2, 2))]
    found = [x.copy() for x in truth]
    found[0][2, 1] = found[2][0, 0] = value
    assert check.verdict(found, truth) == (2, None)


def test_outputs_of_another_shape_are_refused(check):
    with pytest.raises(ValueError, match=r"\(3, 2\).*expected.*\(2, 2\)"):
        check.verdict([np.ones((3, 2))], [np.ones((2, 2))])


def test_turns_rotate_and_end_by_the_clock(timing, batches, monkeypatch):
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)
    made = batches.padded(SEQUENCES, 4)
    called = []
    ways = [(made, lambda batch, name=name: called.append(name)) for name in "ab"]
    found = timing.in_turns(ways, range(3, 9), 0.0)
    assert [[len(own) for own in rounds] for rounds in found] == [[2, 2, 2]] * 2
    assert "".join(called) == "aabb" + "bbaa" + "aabb"
    assert [len(x) for x in timing.in_turns(ways, range(3, 9), 60.0)] == [9, 9]


def test_a_row_without_rounds_has_no_rate(row):
    assert row.record()["tokens_per_s"] is None
    row.timed([[1.0, 3.0], [2.0, 2.0], [1.0, 5.0]], first=9.0)
    record = row.record()
    assert record["seconds"] == [4.0, 4.0, 6.0] and record["tokens_per_s"]["median"] == 250
    assert record["latency_s"] == 2.0 and record["compile_seconds"] == 5.5


def test_every_engine_has_one_name_in_a_class(registry):
    every = [x for e in registry.ENGINES for x in (e, e.fallback) if x is not None]
    assert len({(x.name, x.kind) for x in every}) == len(every)
    for engine in every:
        assert registry.named(engine.name, engine.kind) is engine


def test_what_is_missing_is_a_line_with_a_remedy(registry, monkeypatch):
    (engine,) = (x for x in registry.ENGINES if (x.name, x.kind) == ("openvino", "fp32"))
    monkeypatch.setattr(type(engine), "packages", ("no_such_package", "numpy"))
    line = engine.missing()
    assert "\n" not in line and line.startswith("openvino, fp32: no package no_such_package")
    assert "pip install 'clinattn[engines]'" in line



def test_the_size_of_a_package_is_of_its_files(tmp_path, monkeypatch, engines_on_the_path):
    module = importlib.import_module("engines.engine")
    for name, size in (("sized/a.so", 70), ("sized/b/c.py", 5), ("sized.libs/d.so", 100)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    (tmp_path / "sized" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert module.package_bytes(("sized",)) == 175


def test_what_memory_cannot_hold_is_left_out(registry, monkeypatch):
    """ONNX Runtime holds the scores of all pairs; the other engines do not."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    loads = importlib.import_module("engines.loads")
    note = next(load for load in loads.LOADS if load.name == "note")
    engines = [engine for engine in registry.ENGINES if engine.kind == "fp32"]
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**30 // 4096}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    refused = {engine.name: engine.too_large(note) for engine in engines}
    assert [name for name, line in refused.items() if line] == ["onnxruntime"]
    assert "this machine has 24" in refused["onnxruntime"]
    sizes["SC_PHYS_PAGES"] *= 4
    assert not any(engine.too_large(note) for engine in engines)
