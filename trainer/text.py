"""Text files that people write, whatever editor wrote them.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one, and the line ends of any system. Bytes that are no
text are refused by the file's name, not read as something else.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from trainer.errors import InputError

# UTF-32 stands first: its little-endian mark begins with that of UTF-16
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: str | Path, fix: str = "Check the path.") -> str:
    """The content of a text file, without a byte order mark and with `\\n` at the end of each line.

    Args:
        path: the file.
        fix: what to do where it cannot be read.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise InputError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}", fix=fix) from error
    return decoded(data, path)


def decoded(data: bytes, where: str | Path) -> str:
    """The text that the bytes of a file stand for, as `read_text` gives it. Raises InputError naming `where`."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    expected = "text in UTF-8, or in UTF-16 with a byte order mark"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in line {line}"
        raise InputError(where, "cannot be read", found=found, expected=expected) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(where, "cannot be read", found=f"a zero byte in line {line}", expected=expected)
    return text.replace("\r\n", "\n").replace("\r", "\n")
