"""bench/models/engines on small models: every engine that is installed agrees with torch."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
from transformers import BertConfig, ModernBertConfig

pytestmark = pytest.mark.usefixtures("engines_on_the_path")
LENGTHS = (70, 9, 33, 1)
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 90}
MODELS = {
    "BERT base": (BertConfig, SIZES),
    # a window that padding leaves behind, and three layers, of which two have it
    "ModernBERT base": (ModernBertConfig, SIZES | {"local_attention": 16, "pad_token_id": 0}),
}
EXACT = 1e-5  # rms relative in fp32, of three layers: some 2^-24 times what a layer adds up
ROUNDED = 0.05  # with bf16 products


@pytest.fixture(scope="module")
def group(engines_on_the_path):
    return importlib.import_module("engines.group")


@pytest.fixture(scope="module", params=list(MODELS))
def setting(request, group, tmp_path_factory):
    loads = importlib.import_module("engines.loads")
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loads, "MODELS", MODELS)
        loads.config.cache_clear()
        loads.write_model(request.param, 3, folder)
    loads.config.cache_clear()
    (load, *_) = (x for x in loads.LOADS if x.model == request.param)
    small = dataclasses.replace(load, batch=2, layers=3, apart=False)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(5, 90, n) for n in LENGTHS]
    return group.Setting(small, sequences, folder, 1, range(1, 1), 0.0)


def measured(group, setting, engines):
    said = []
    rows = group.measure(setting, engines, setting.truth(), said.append)
    return {(row.engine, row.batching): row for row in rows}, said


def engine(name, kind):
    return importlib.import_module("engines.registry").named(name, kind)


@pytest.mark.parametrize(
    "name, kind, ways",
    [
        ("torch", "fp32", {"padded", "sorted"}),
        ("torch", "16 bit", {"padded", "sorted"}),
        ("torch autocast", "16 bit", {"padded", "sorted"}),
        ("clinattn", "fp32", {"padded", "packed"}),
        ("clinattn", "16 bit", {"padded", "packed"}),
    ],
)
def test_engines_of_torch_agree(group, setting, name, kind, ways):
    rows, said = measured(group, setting, [engine(name, kind)])
    assert {batching for _, batching in rows} == ways, said
    for row in rows.values():
        assert row.not_finite == 0 and row.seconds and row.latency_s > 0
        assert row.error <= (EXACT if kind == "fp32" else ROUNDED)
        assert row.tokens == sum(LENGTHS) and row.longest == max(LENGTHS)


@pytest.mark.parametrize("package", ["openvino", "onnxruntime"])
def test_converted_graphs_agree_or_are_not_timed(group, setting, package):
    """Where a graph gives NaN, one with finite masks is compared too."""
    own = engine(package, "fp32")
    for name in (*own.packages, *own.converts):
        pytest.importorskip(name)
    rows, said = measured(group, setting, [own])
    assert {batching for _, batching in rows} == {"padded", "sorted"}, said
    for row in rows.values():
        assert bool(row.seconds) == (row.not_finite == 0)
        assert row.error is None if row.not_finite else row.error <= EXACT
    for batching in ("padded", "sorted"):
        assert any(row.seconds for (_, how), row in rows.items() if how == batching), said


class Fixed:
    """An engine that answers with what it was given; packages as any has them."""

    kind, packages, batchings, fallback = "fp32", ("numpy",), ("padded",), None

    def __init__(self, name, value, fallback=None):
        self.name, self.value, self.fallback = name, value, fallback

    def convert(self, folder, masked):
        pass

    def open(self, folder, masked, threads):
        if self.value is None:
            raise RuntimeError("cannot be opened\nat all")
        return lambda batch: np.full((*batch.ids.shape, 32), self.value)


def test_nan_is_kept_untimed_and_its_fallback_is_tried(group, setting):
    rows, said = measured(group, setting, [Fixed("a", np.nan, Fixed("b", 1.0)), Fixed("c", 2.0)])
    assert rows["a", "padded"].not_finite == len(LENGTHS) and not rows["a", "padded"].seconds
    assert rows["b", "padded"].seconds and rows["c", "padded"].seconds
    assert any("NaN in real tokens of 4 sequences" in line for line in said)


def test_an_engine_that_fails_leaves_the_others(group, setting):
    rows, said = measured(group, setting, [Fixed("a", None), Fixed("b", 1.0)])
    assert set(rows) == {("b", "padded")}
    assert any("RuntimeError" in line and "cannot be opened" in line for line in said)
