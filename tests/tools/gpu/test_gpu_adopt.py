"""bench/gpu/adopt.py, on the tables as they are and rows as a device would give them."""

import importlib
import json
from dataclasses import astuple

import pytest
import torch
from places import BENCH

GPU = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05+00:00"}
HOPPER = (9, 0)
KINDS = ("plain", "window", "pairs", "terms", "keys", "values", "values_pairs")


@pytest.fixture
def adopt(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu.adopt")


def tables(text):
    names = {"__name__": "configs"}
    exec(compile(text, "configs.py", "exec"), names)
    return names


def row(configs, table, dim, best, gain, kind="plain", bits=16):
    """A verdict of the stage candidates, against what these tables have."""
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    shipped = list(astuple(configs["tile_config"](table, HOPPER, dim, dtype, kind)))
    best = shipped if best is None else best
    fields = dict(table=table, dim=dim, kind=kind, bits=bits, best=best, shipped=shipped)
    return GPU | fields | {"times_as_fast": gain, "stage": "candidates"}


def every_tile(configs):
    return {
        (table, card, dim, dtype, kind): astuple(
            configs["tile_config"](table, card, dim, dtype, kind)
        )
        for table in ("forward", "dkdv", "dq")
        for card in ((8, 0), HOPPER, (10, 0))
        for dim in (64, 128, 256)
        for dtype in (torch.bfloat16, torch.float32)
        for kind in KINDS
    }


def test_a_gain_changes_one_row_and_says_why(adopt):
    text = adopt.CONFIGS.read_text()
    before = tables(text)
    rows = [row(before, "dkdv", 128, [32, 128, 8, 4], 1.254, kind="keys")]
    after, refused = adopt.adopted(text, adopt.verdicts(rows))
    assert not refused
    old, new = every_tile(before), every_tile(tables(after))
    changed = [key for key in old if old[key] != new[key]]
    assert changed == [("dkdv", HOPPER, 128, torch.bfloat16, "keys")]
    assert "# keys: 1.25 times as fast as (" in after
    assert "(H100 80GB HBM3, 2026-01-02)" in after
    assert max(map(len, after.splitlines())) <= 100


def test_a_row_of_its_own_is_made_for_a_kind(adopt):
    text = adopt.CONFIGS.read_text()
    rows = [row(tables(text), "dq", 256, [64, 16, 4, 2], 2.0, kind="keys")]
    after, _ = adopt.adopted(text, adopt.verdicts(rows))
    found = tables(after)["tile_config"]("dq", HOPPER, 256, torch.bfloat16, "keys")
    assert astuple(found) == (64, 16, 4, 2)


@pytest.mark.parametrize(("best", "gain"), [(None, 1.0), ([64, 64, 4, 3], 1.01)])
def test_without_a_gain_the_row_stays_and_says_so(adopt, best, gain):
    text = adopt.CONFIGS.read_text()
    rows = [row(tables(text), "forward", 128, best, gain)]
    after, _ = adopt.adopted(text, adopt.verdicts(rows))
    assert every_tile(tables(after)) == every_tile(tables(text))
    assert "# plain: no tile that was timed is 1.03 times as fast (H100" in after


def test_a_second_measurement_takes_the_place_of_the_first(adopt):
    text = adopt.CONFIGS.read_text()
    rows = [row(tables(text), "forward", 64, [128, 128, 8, 3], gain) for gain in (7.1, 7.2)]
    once, _ = adopt.adopted(text, adopt.verdicts(rows[:1]))
    assert adopt.adopted(once, adopt.verdicts(rows[:1]))[0] == once
    twice, _ = adopt.adopted(once, adopt.verdicts(rows))
    assert "7.20 times" in twice and "7.10 times" not in twice


def test_what_it_cannot_take_is_left_out(adopt):
    text = adopt.CONFIGS.read_text()
    shared = row(tables(text), "forward", 64, [64, 32, 8, 2], 1.5, bits=32)
    stale = row(tables(text), "dq", 64, [64, 64, 4, 3], 1.5) | {"shipped": [16, 16, 4, 1]}
    untimed = row(tables(text), "dq", 128, None, float("nan"))
    after, refused = adopt.adopted(text, adopt.verdicts([shared, stale, untimed]))
    assert every_tile(tables(after)) == every_tile(tables(text))
    assert len(refused) == 2 and "shared" in refused[0] and "was timed" in refused[1]
    with pytest.raises(ValueError, match="RTX"):
        adopt.verdicts([shared | {"gpu": "NVIDIA RTX 4090"}])


def test_prints_the_change_and_writes_it_when_asked(adopt, tmp_path, monkeypatch, capsys):
    text = adopt.CONFIGS.read_text()
    configs, rows = tmp_path / "configs.py", tmp_path / "rows.jsonl"
    configs.write_text(text)
    monkeypatch.setattr(adopt, "CONFIGS", configs)
    row_of_gain = row(tables(text), "forward", 64, [128, 128, 8, 3], 1.3)
    rows.write_text("\n".join(map(json.dumps, [GPU | {"stage": "build"}, row_of_gain])))
    assert adopt.main([str(rows)]) == 0
    assert configs.read_text() == text
    assert "+            # plain: 1.30 times as fast" in capsys.readouterr().out
    adopt.main([str(rows), "--write"])
    assert "1.30 times as fast" in configs.read_text()
