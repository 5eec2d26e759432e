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
TO_NAME = "expected encoding (--encoding) to name it, such as gb18030, utf-16-le, big5 or cp1252"
# Of Chinese: most characters are of GB2312, and some are those that no page does without. Western
# text has neither as GB18030, Russian and Korean text only the first.
IN_GB2312, FREQUENT = 0.9, 0.15
MOST_FREQUENT = frozenset(
    "的一是了不在有人我这中大来上个国和也子时说出到地要下以生会自年过家对可后小心多天而能好都没日于起"
    "还发成事只作用主行方前所经头面三已从动两长现分外身高进二月点全者部正定女男问给间体位因重"
    "患诉痛胸腹血压查诊断治疗药病症状术入院检未见异常阳性阴炎感热咳右左无予为及至岁脉次量功加减明"
)


class Decoded(NamedTuple):
    text: str
    encoding: str


def decoded(content: bytes, encoding: str | None, where: str) -> Decoded:
    """The text of a file's bytes, by the encoding that is named, or else by the one recognised.

    A byte order mark names an encoding, and is no part of the text. Without one it is UTF-8, or
    GB18030 if that gives Chinese: the bytes of many other encodings are valid GB18030, too.
    where: the input, for error messages.
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
        f"{where} cannot be read: byte {place:,} is not of UTF-8, and it does not look like "
        f"Chinese in GB18030: {TO_NAME}"
    )


def _is_chinese(content: bytes) -> bool:
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return False
    others = [character for character in text if character >= "\x80"]
    ideographs = [character for character in others if "\u3400" <= character < "\ua000"]
    common = sum(character in MOST_FREQUENT for character in ideographs)
    known = sum(_in_gb2312(character) for character in others)
    return known >= IN_GB2312 * len(others) and common > FREQUENT * len(ideographs)


def _in_gb2312(character: str) -> bool:
    try:
        character.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True
