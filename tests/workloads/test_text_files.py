"""Files of texts and labels: their forms, columns and encodings, and what is refused in a line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from clinattn.workloads.tables import Columns, Row, read_rows  # noqa: E402

RECORDS = [
    {"text": "主诉：胸痛３天，\n加重", "label": "心内科", "subject_id": "7"},
    {"text": "T 36.5, no \"pain\"\there", "label": "other", "subject_id": ""},
]
ROWS = [
    Row(RECORDS[0]["text"], "心内科", "7"),
    Row(RECORDS[1]["text"], "other", RECORDS[1]["text"]),
]


def separated(records, delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def write(path: Path, records=RECORDS, encoding: str = "utf-8") -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
        return path
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    else:
        text = separated(records, "\t" if path.suffix == ".tsv" else ",")
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_form_gives_the_same_rows(tmp_path, ending):
    assert read_rows(write(tmp_path / f"a.{ending}"), True).rows == ROWS


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("gbk", "gb18030"),
        ("gb18030", "gb18030"),
        ("utf-16", "utf-16"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-32", "utf-32"),
    ],
)
def test_encodings_are_recognised(tmp_path, ending, encoding, found):
    read = read_rows(write(tmp_path / f"a.{ending}", encoding=encoding), True)
    assert read.rows == ROWS and read.encoding == found


@pytest.mark.parametrize(
    ("encoding", "text", "message"),
    [
        ("utf-16-le", "胸痛", "zero bytes, as UTF-16 without a byte order mark: expected"),
        ("utf-16-be", "pain", "zero bytes"),
        ("big5", "患者主訴胸痛三天", "not of UTF-8, and it does not look like Chinese in GB18030"),
        ("cp1252", "Jérôme, fiévreux", "does not look"),  # valid GB18030, of rare characters
        ("cp1251", "Больной жалуется на боль в груди", "does not look"),  # of GB2312, even
        ("euc_kr", "환자는 삼일 전부터 흉통으로 응급실로 내원하였다", "does not look"),
        ("euc_jp", "患者は三日前から胸痛を訴えて来院した", "does not look"),
        ("shift_jis", "患者は胸痛を訴えた", "does not look"),
    ],
)
def test_other_encodings_are_named_by_the_user(tmp_path, encoding, text, message):
    path = write(tmp_path / "a.csv", [{"text": text, "label": "x"}], encoding)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path, True)
    assert "--encoding" in str(caught.value) and "\n" not in str(caught.value)
    (row,) = read_rows(path, True, encoding=encoding).rows
    assert row.text == text
    with pytest.raises(ValueError, match="encoding='latin-99' is unknown: expected a name of Py"):
        read_rows(path, True, encoding="latin-99")


def test_an_encoding_that_is_not_the_files_is_named(tmp_path):
    path = write(tmp_path / "a.csv", encoding="gbk")
    with pytest.raises(ValueError, match=r"byte \d+ is not of encoding='utf-8': expected that of"):
        read_rows(path, True, encoding="utf-8")


def test_a_long_note_is_one_field(tmp_path):
    text = "word " * 100_000
    assert read_rows(write(tmp_path / "a.csv", [{"text": text}]), False).rows[0].text == text


def test_columns_have_other_names(tmp_path):
    path = write(tmp_path / "a.csv", [{"note": "x", "icd": "A"}, {"note": "y", "icd": "B"}])
    rows = read_rows(path, True, columns=Columns("note", "icd")).rows
    assert rows == [Row("x", "A", "x"), Row("y", "B", "y")]
    with pytest.raises(ValueError, match=r"line 2 has no 'text' \(it has \['icd', 'note'\]\)"):
        read_rows(path, True)


TEXTS = [{"id": 1, "text": "x"}, {"id": 2, "text": "y"}]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_labels_of_another_file_are_joined_by_id(tmp_path, ending):
    texts = write(tmp_path / "t.jsonl", TEXTS)
    others = [{"id": i, "label": f"c{i % 2}"} for i in (3, 2, 1, 1)]
    labels = write(tmp_path / f"l.{ending}", others)
    assert [row.label for row in read_rows(texts, True, labels=labels).rows] == ["c1", "c0"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"id": 1, "label": "a"}], "labels='.*l.csv' has no label for id '2' of text_file='"),
        (
            [{"id": 1, "label": "a"}, {"id": 1, "label": "b"}],
            "line 3 gives id '1' the label 'b' besides 'a': expected one",
        ),
        ([{"key": 1, "label": "a"}], r"line 2 has no 'id' \(it has \['key', 'label'\]\)"),
        ([{"id": 1, "label": ""}], "line 2 has no 'label'"),
    ],
    ids=["none", "two", "column", "empty"],
)
def test_labels_that_do_not_fit_are_named(tmp_path, labels, message):
    texts, path = write(tmp_path / "t.jsonl", TEXTS), write(tmp_path / "l.csv", labels)
    with pytest.raises(ValueError, match=message):
        read_rows(texts, True, labels=path)


def test_a_torn_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="a.parquet' cannot be read: "):
        read_rows(tmp_path / "a.parquet", False)
