"""Text files of people are read whatever editor wrote them, and what is no text is refused by its name."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.cluster.sweep import elements
from trainer.config import load_config
from trainer.data.layout import load_layout
from trainer.errors import InputError
from trainer.run.files import read_json
from trainer.scoring.atlas import networks
from trainer.text import decoded, read_text

WITH_MARK = {
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
CONFIG = """# é
data: {shards: somewhere}
include_features: [a/b]
val_set_name: val
datasets: {train: {}, val: {filter: {films: [Amélie]}}}
"""
LAYOUT = """name: mine
tr: 1.5
subjects: {001: sub-001}
series: {s: {bold: {file: "{subject}.h5", dataset: "{run}"}}}
feature_files: ["{model}/{run}.h5"]
features: {m: {folder: é}}
"""


def as_editors_save(text: str) -> list[bytes]:
    """A text in every encoding, with the line ends of every system."""
    ends = [text.replace("\n", end) for end in ("\n", "\r\n", "\r")]
    return [mark + each.encode(name) for each in ends for name, mark in [*WITH_MARK.items(), ("utf-8", b"")]]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0\ufeff")))
def test_text_is_the_same_in_every_encoding_and_with_every_line_end(text: str) -> None:
    assert {decoded(data, "f") for data in as_editors_save(text)} == {text}


def test_every_file_that_people_write_is_read_in_every_encoding(tmp_path: Path) -> None:
    path = tmp_path / "file"
    readers = [
        (CONFIG, lambda: load_config(path).datasets["val"].filter.films, ["Amélie"]),
        (LAYOUT, lambda: load_layout(path).features["m"].folder, "é"),
        ("datasets.val.filter.films: [[é], [b]]\n", lambda: [e.overrides[0][-5:] for e in elements(path)], None),
        ("1 7Networks_LH_Vis_1 0\n2 7Networks_LH_Défaut_1 0\n", lambda: networks(path, 2), ["Vis", "Défaut"]),
        (json.dumps({"é": 1}, ensure_ascii=False, indent=1), lambda: read_json(path), {"é": 1}),
    ]
    for text, read, expected in readers:
        for data in as_editors_save(text):
            path.write_bytes(data)
            assert read() == (expected or ['["é"]', '["b"]'])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: 1\nb: caf\xe9\n", r"f: cannot be read: found byte 0xe9 in line 2, expected text in UTF-8, or in UTF-16"),
        (b"\x89PNG\r\n\x1a\n", "f: cannot be read: found byte 0x89 in line 1"),
        ("a: 1\nb".encode("utf-16-le"), "f: cannot be read: found a zero byte in line 1"),
        (codecs.BOM_UTF16_LE + b"a", "f: cannot be read: found byte 0x61 in line 1"),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_their_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoded(data, "f")


@pytest.mark.parametrize("name", ["nowhere", ".", "a\0b"])
def test_file_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read: .*\. Correct it\."):
        read_text(tmp_path / name, fix="Correct it.")
