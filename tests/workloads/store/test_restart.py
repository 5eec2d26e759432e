"""clinattn prepare ended at any place and begun again: the same files, or a clear refusal."""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager

import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("filelock")

import limits  # noqa: E402
import stores  # noqa: E402

from clinattn.files import disk  # noqa: E402
from clinattn.workloads import MedsError  # noqa: E402
from clinattn.workloads.store import inputs, making, prepare  # noqa: E402
from clinattn.workloads.store.format import WORK  # noqa: E402


class Ended(BaseException):
    """The end of a process, after which nothing more is written."""


@pytest.fixture
def ward(tmp_path):
    return stores.write(tmp_path / "ward", stores.thirds(stores.events()), row_group_size=40)


@contextmanager
def ended_at(count: int):
    """Ends where file number `count` would take its place. Nothing is swept up, as after a kill."""
    replace, left = os.replace, [count]

    def counted(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Ended
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk.os, "replace", counted)
        patch.setattr(disk.Path, "unlink", lambda *_, **__: None)
        patch.setattr(prepare, "_sweep", lambda folder: None)
        yield


def test_a_run_that_ended_at_any_file_goes_on_to_the_same_bytes(tmp_path, ward):
    whole = stores.contents(stores.made(ward, tmp_path / "whole", 100))
    for count in itertools.count():
        folder = tmp_path / str(count)
        try:
            with ended_at(count):
                stores.made(ward, folder, 100)
            break
        except Ended:
            assert list(folder.rglob(".*.partial*")) and not (folder / "store.json").exists()
        assert stores.contents(stores.made(ward, folder, 100)) == whole
    assert count > 2 * len([name for name in whole if name.startswith("events-")]) + 4


def test_what_is_whole_is_not_made_again(tmp_path, ward, monkeypatch):
    made: list[str] = []

    def stop(message, done, total):
        if message.startswith("writing") and done > total // 2:
            raise Ended

    for name in ("make_scan", "make_piece"):
        owner = making.scan if name == "make_scan" else making
        work = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *task, work=work, name=name: made.append(name) or work(*task)
        )
    with pytest.raises(Ended):
        stores.made(ward, tmp_path / "store", progress=stop)
    scans, pieces = made.count("make_scan"), made.count("make_piece")
    assert scans > 3 and pieces > 3
    told: list[tuple[str, int]] = []
    stores.made(ward, tmp_path / "store", progress=lambda m, done, _: told.append((m, done)))
    assert made.count("make_scan") == scans
    whole = stores.made(ward, tmp_path / "other")
    assert made.count("make_piece") - pieces == 2 * len(list(whole.glob("events-*"))) - pieces
    written = [done for message, done in told if message.startswith("writing")]
    assert written[0] > 0 and written == sorted(written)
    assert stores.contents(whole) == stores.contents(tmp_path / "store")


def test_a_whole_store_is_left_as_it_is(tmp_path, ward):
    store = stores.made(ward, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    (store / WORK).mkdir()  # left by a kill at the last moment
    assert prepare.prepare(ward, store, 1) is False
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before


def half(ward, folder):
    """A store that was begun."""

    def stop(message, *_):
        if message.startswith("writing"):
            raise Ended

    with pytest.raises(Ended):
        stores.made(ward, folder, progress=stop)
    return folder


def grown(ward):
    path = ward / "data" / "1.parquet"
    stores.write(ward, {"1.parquet": pa.concat_tables([pa.parquet.read_table(path)] * 2)})


def touched(ward):
    path = ward / "data" / "1.parquet"
    os.utime(path, ns=(0, 0))


def rewritten(ward):
    """The same size and time, other contents."""
    path = ward / "data" / "1.parquet"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def removed(ward):
    (ward / "data" / "1.parquet").unlink()


def added(ward):
    stores.write(ward, {"1.5.parquet": stores.events(7)})


CHANGES = [grown, touched, removed, added]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_files_that_changed_since_a_store_was_begun_are_named(tmp_path, ward, change):
    folder = half(ward, tmp_path / "store")
    change(ward)
    name = "data/1.5.parquet" if change is added else "data/1.parquet"
    message = f"meds_dir='{ward}': {name} has changed since these timelines were begun"
    with pytest.raises(MedsError, match=message):
        stores.made(ward, folder)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_whole_store_of_files_that_changed_is_refused(tmp_path, ward, change):
    folder = stores.made(ward, tmp_path / "store")
    before = stores.contents(folder)
    change(ward)
    with pytest.raises(MedsError, match=f"'{folder}' holds the timelines of meds:{ward} as it was"):
        stores.made(ward, folder)
    assert stores.contents(folder) == before


@pytest.mark.parametrize("change", [grown, touched, rewritten, removed], ids=lambda f: f.__name__)
def test_files_that_change_while_a_store_is_made_are_named(tmp_path, ward, change):
    def at_once(message, done, total):
        if message.startswith("writing") and not done:
            change(ward)

    with pytest.raises(MedsError, match=r"data/1.parquet has changed since these timelines"):
        stores.made(ward, tmp_path / "store", progress=at_once)
    assert not (tmp_path / "store" / "store.json").exists()


def test_the_end_of_a_file_tells_it_from_another(tmp_path, ward):
    before = inputs.inputs_of(ward)[0]
    for file in before:
        inputs.require_same(ward, file)
    rewritten(ward)
    with pytest.raises(MedsError, match="data/1.parquet has changed"):
        inputs.require_same(ward, before[1])
    assert [file.name for file in before] == ["data/0.parquet", "data/1.parquet", "data/2.parquet"]


def test_a_folder_with_something_else_is_refused(tmp_path, ward):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "thesis.docx").write_text("x")
    with pytest.raises(ValueError, match=r"output='.*store' holds thesis.docx: expected a new or"):
        stores.made(ward, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.docx"]
    other = stores.write(tmp_path / "other", {"0.parquet": stores.events(3)})
    with pytest.raises(MedsError, match="holds the beginning of the timelines of .*ward: expected"):
        stores.made(other, half(ward, tmp_path / "begun"))


def test_a_full_disk_names_the_file_and_what_is_whole_is_kept(tmp_path, ward):
    whole = stores.contents(stores.made(ward, tmp_path / "whole"))
    folder = tmp_path / "store"
    with limits.largest_file(1_400), pytest.raises(OSError) as error:
        stores.made(ward, folder)
    assert error.value.filename and str(folder) in error.value.filename
    assert not list(folder.rglob(".*.partial*")) and list((folder / WORK).iterdir())
    assert stores.contents(stores.made(ward, folder)) == whole


def test_room_that_will_not_do_is_told_before_timelines_are_written(tmp_path, ward, monkeypatch):
    free = making.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(making.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="the timelines take 7 kB more, and 1 kB are free"):
        stores.made(ward, tmp_path / "store")
    assert not list((tmp_path / "store").glob("events-*"))
