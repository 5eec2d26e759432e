"""Stores that are opened: what is read without a copy, and what is refused."""

from __future__ import annotations

import json
import mmap

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("filelock")

import stores  # noqa: E402

from clinattn.workloads import MedsError, open_source, timelines  # noqa: E402
from clinattn.workloads.code_names import code_descriptions  # noqa: E402
from clinattn.workloads.store import format, mapped, prepare  # noqa: E402
from clinattn.workloads.store.reading import store_source  # noqa: E402


@pytest.fixture
def ward(tmp_path):
    return stores.write(tmp_path / "ward", stores.thirds(stores.events()))


@pytest.fixture
def store(tmp_path, ward):
    return stores.made(ward, tmp_path / "store")


def test_a_sequence_is_a_view_of_a_file(store):
    source = store_source(store)
    for index in range(len(source)):
        begin, _, end = source.bounds(index)
        for column in (source.ids, source.times, source.values):
            found = column[begin:end]
            assert not found.flags.owndata and not found.flags.writeable
    base = source.times[:3]
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, (mmap.mmap, memoryview, pa.Buffer))


def test_meds_of_a_store_opens_the_store(store, ward):
    source = open_source(f"meds:{store}")
    stores.assert_same_sequences(source, open_source(f"meds:{ward}"))
    assert source.where == f"meds_dir='{store}'"


def test_a_store_that_is_not_whole_is_refused(tmp_path, ward):
    class Ended(BaseException):
        pass

    def stop(message, *_):
        if message.startswith("writing"):
            raise Ended

    with pytest.raises(Ended):
        stores.made(ward, tmp_path / "store", progress=stop)
    with pytest.raises(MedsError, match="store' is a store of which a part is missing: expected"):
        open_source(f"meds:{tmp_path / 'store'}")


def damaged(path, how):
    content = path.read_bytes()
    if how == "absent":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"x" * len(content))


@pytest.mark.parametrize("how", ["absent", "short", "empty", "other"])
@pytest.mark.parametrize("name", ["events-00001.arrow", "patients.arrow", "codes.arrow"])
def test_a_file_that_is_damaged_is_named(store, name, how):
    damaged(store / name, how)
    with pytest.raises(MedsError, match=f"meds_dir='{store}': {name} cannot be read .*: expected"):
        store_source(store)
    if name == "codes.arrow":
        with pytest.raises(MedsError, match=f"{name} cannot be read"):
            code_descriptions(store)


def test_a_file_of_another_store_is_named(tmp_path, store):
    """A file of the same size, which only its rows tell from the right one."""
    path, other = store / "events-00001.arrow", store / "events-00000.arrow"
    path.write_bytes(other.read_bytes())
    said = json.loads((store / "store.json").read_text())
    said["files"][path.name] = said["files"][other.name]
    (store / "store.json").write_text(json.dumps(said))
    with pytest.raises(MedsError, match="events-00001.arrow has .* rows of .*: expected"):
        store_source(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"store.json is of format 2: expected 1; clinattn prepare makes it again"),
        ({"format": None}, r"store.json cannot be read \(format is null: expected a whole number"),
        ({"files": []}, r"store.json cannot be read \(files is a list: expected named values"),
        ({"events": []}, r"cannot be read \(events is a list: expected a list of 1 or more"),
        ({"splits": {"names": []}}, r"cannot be read \(splits.digest is missing"),
        (None, "store.json cannot be read"),
    ],
)
def test_a_store_json_that_does_not_fit_is_refused(store, change, message):
    path = store / "store.json"
    path.write_text("{" if change is None else json.dumps(format.about(store) | change))
    with pytest.raises(MedsError, match=message):
        open_source(f"meds:{store}")


def test_the_pages_that_are_read_do_not_add_up(tmp_path, bench_on_the_path, monkeypatch):
    """Reading all patients in any order leaves a bounded part of the files in memory."""
    import made_timelines

    events, most = 2_000_000, 1 << 23
    made_timelines.write(tmp_path / "ward", events, 2, seed=0)
    folder = stores.made(tmp_path / "ward", tmp_path / "store", 1 << 18)
    monkeypatch.setattr(mapped, "MOST", most)
    monkeypatch.setattr(mapped, "EVERY", 1 << 18)
    store = store_source(folder)
    order = np.random.default_rng(0).permutation(len(store))
    largest = total = 0
    for number, index in enumerate(order.tolist()):
        begin, _, end = store.bounds(index)
        for column in (store.ids, store.times, store.values):
            total += int(np.isnan(column[begin:end]).sum())
        if number % 500 == 0:
            largest = max(largest, resident(folder))
    assert total and most // 2 < largest < 2 * most < 16 * events / 1.5


def resident(folder) -> int:
    """Bytes of the files of a folder that are mapped and in memory."""
    total, ours = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if line[0].islower() or line[0].isdigit():  # "7f0c...-7f0d... r--s ... PATH"
                ours = str(folder) in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def many(monkeypatch):
    """More events than are read into memory, by a bound of 100."""
    monkeypatch.setattr(timelines, "IN_MEMORY", 100)


def test_a_large_folder_is_made_into_a_store_beside_the_output(tmp_path, ward, many, monkeypatch):
    said: list[str] = []
    beside = tmp_path / "run" / timelines.BESIDE
    expected = timelines.meds_source(ward)
    source = open_source(f"meds:{ward}", beside=beside, say=said.append)
    stores.assert_same_sequences(source, expected)
    assert source.where == f"meds_dir='{ward}'" and format.is_store(beside)
    events = len(expected.ids)
    told = f"{events:,} events are more than are read into memory: their timelines are kept in "
    assert said == [f"{told}{beside}"]
    monkeypatch.setattr(prepare.Making, "run", None)  # the next run makes nothing
    stores.assert_same_sequences(open_source(f"meds:{ward}", beside=beside), expected)
    stores.write(ward, {"3.parquet": stores.events(9)})
    with pytest.raises(MedsError, match="holds the timelines of .*: expected those of"):
        open_source(f"meds:{ward}", beside=beside)


def test_without_an_output_the_store_goes_with_the_process(tmp_path, ward, many, monkeypatch):
    monkeypatch.setattr(timelines.tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    said: list[str] = []
    expected = timelines.meds_source(ward)
    source = open_source(f"meds:{ward}", say=said.append)
    assert not list((tmp_path / "t").iterdir())
    stores.assert_same_sequences(source, expected)
    assert f"their timelines are in {tmp_path}/t/clinattn-timelines-" in said[0]


def test_a_small_folder_is_read_into_memory(tmp_path, ward):
    said: list[str] = []
    source = open_source(f"meds:{ward}", beside=tmp_path / "run" / "timelines", say=said.append)
    assert isinstance(source.ids, np.ndarray) and not said and not (tmp_path / "run").exists()
