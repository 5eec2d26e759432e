"""Files: written whole or not at all, and named where they cannot be."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from clinattn.files.disk import parse_json, require_writable, write_text, written_whole


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), KeyError(1)])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("before")
    with pytest.raises(type(error)), written_whole(path) as beside:
        beside.write_text("half")
        raise error
    assert names(tmp_path) == ["x.json"] and path.read_text() == "before"


def test_an_error_names_the_file_and_not_the_one_beside_it(tmp_path):
    with pytest.raises(OSError) as found, written_whole(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert found.value.filename == str(tmp_path / "x.json")
    with pytest.raises(OSError) as found:
        write_text(tmp_path / "absent" / "x.json", "x")
    assert found.value.filename == str(tmp_path / "absent" / "x.json")


def test_a_link_stays_one_and_a_mode_is_kept(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "after"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640


def test_a_device_is_written_to_directly(tmp_path):
    read, write = os.pipe()
    require_writable(f"/dev/fd/{write}")
    write_text(f"/dev/fd/{write}", "through")
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "through"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[" * 65 + "]" * 65, "nested deeper than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
        (b"\xff\xff", "utf-8"),
        ("", "Expecting value"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_json_that_is_none_has_a_reason(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_of_many_levels_is_read():
    assert parse_json("[" * 64 + "]" * 64) and parse_json(b'{"a": [1, {}]}') == {"a": [1, {}]}
