"""Text from bytes: UTF-8, GB18030 (with GBK and GB2312) and marked UTF-16 are recognised."""

from __future__ import annotations

import codecs
from typing import NamedTuple

MARKS = {  # UTF-32's little-endian mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TO_NAME = "expected encoding (--encoding) to name it, such as utf-16-le, big5, shift_jis or cp1252"
COMMON = 0.9  # share of GB2312, the 6,763 characters of daily use, in what is taken for Chinese


class Decoded(NamedTuple):
    text: str
    encoding: str


def decoded(content: bytes, encoding: str | None, where: str) -> Decoded:
    """The text of a file's bytes, by the encoding that is named, or else by the one recognised.

    A byte order mark names an encoding, and is no part of the text. Without one it is UTF-8, or
    GB18030 if nearly all of its characters are common Chinese ones: bytes of Western European
    encodings can be valid GB18030, too. where: the input, for error messages.
    Raises ValueError for an encoding that is unknown, not that of the bytes, or not recognised.
    """
    if encoding is not None:
        try:
            text = content.decode(encoding)
        except LookupError:
            raise ValueError(
                f"encoding={encoding!r} is unknown: expected a name of Python's, such as gb18030"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where} cannot be read: byte {error.start:,} is not of encoding={encoding!r}: "
                "expected that of the file"
            ) from None
        return Decoded(text.removeprefix("\ufeff"), encoding)
    for mark, name in MARKS.items():
        if content.startswith(mark):
            return decoded(content, name, where)
    if b"\0" in content:
        raise ValueError(
            f"{where} cannot be read: it has zero bytes, as UTF-16 without a byte order mark: "
            f"{TO_NAME}"
        )
    try:
        return Decoded(content.decode("utf-8"), "utf-8")
    except UnicodeDecodeError as error:
        place = error.start
    if _is_chinese(content):
        return Decoded(content.decode("gb18030"), "gb18030")
    raise ValueError(
        f"{where} cannot be read: byte {place:,} is not of UTF-8, and it is no GB18030: {TO_NAME}"
    )


def _is_chinese(content: bytes) -> bool:
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return False
    others = [character for character in text if character >= "\x80"]
    common = sum(_in_gb2312(character) for character in others)
    return common >= COMMON * len(others)


def _in_gb2312(character: str) -> bool:
    try:
        character.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True
