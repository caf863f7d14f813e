"""YAML is read by the core schema of YAML 1.2, labels as they are written, and what is written reads back."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import InputError
from trainer.strict import parse_yaml
from trainer.written import Written, core, parse_written, yaml_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("008", 8), ("-012", -12), ("+1", 1), ("0x10", 16), ("0o10", 8), ("0", 0), ("-0", 0),
        ("1.0", 1.0), (".5", 0.5), ("1.", 1.0), ("-.5e-3", -0.0005), ("3e-4", 3e-4), ("12e4", 120000.0), ("01.50", 1.5),
        ("+.inf", math.inf), ("-.INF", -math.inf), ("true", True), ("True", True), ("FALSE", False),
        ("null", None), ("~", None), ("NULL", None), ("", None),
    ],
)  # fmt: skip
def test_numbers_booleans_and_null_are_those_of_the_core_schema(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    ["NO", "no", "ON", "off", "yes", "y", "n", "tRUE", "1_000", "1_0.5", "0b11", "12:30", "12:00:00", "1-12:00:00",
     "2024-01-01", "2024-01-01 10:00:00", "-0x10", "+0o7", "0o8", "1e", "e3", ".", "-", "inf", "nan",
     ".Nan", "nUll", "=", "1.2.3"],
)  # fmt: skip
def test_everything_else_is_text(text: str) -> None:
    assert parse_written(text if text != "-" else "'-'") == text


@given(st.from_regex(r"[-+]?(0x|0o)?[0-9a-fA-F_:.]{1,8}", fullmatch=True))
def test_plain_scalar_keeps_its_text_whatever_it_reads_as(text: str) -> None:
    try:
        found = parse_written(f"[{text}]")[0]
    except InputError:  # a colon at the end
        return
    if not isinstance(found, dict):
        assert (found.text if isinstance(found, Written) else found) == text


def test_quoted_and_tagged_scalars_are_what_they_say() -> None:
    assert parse_yaml("['010', \"true\", !!str 010, !!int '010', !!float 3]") == ["010", "true", "010", 10, 3.0]


def test_keys_are_text_as_written() -> None:
    text = "{001: a, NO: b, 1.0: c, true: d, ~: e, null: f, 12:30: g, '=': h}"
    assert list(parse_written(text)) == ["001", "NO", "1.0", "true", "~", "null", "12:30", "="]


MERGES = [
    "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3, z: 4}",
    "a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a}",
    "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b], z: 0}",
    "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\nd: {<<: [*b, *a]}",
    "a: &a {x: {p: 1}}\nb: {<<: *a}",
    "b: {<<: {x: 1}, y: 2}",
    "b: {<<: [], y: 2}",
]


@pytest.mark.parametrize("text", MERGES)
def test_merge_keys_work_as_in_pyyaml(text: str) -> None:
    found, expected = parse_yaml(text), yaml.safe_load(text)
    assert found == expected
    assert [list(value) for value in found.values()] == [list(value) for value in expected.values()]


def test_two_merge_keys_are_no_key_given_twice() -> None:
    text = "a: &a {x: 1}\nb: &b {x: 2}\nc: {<<: *a, <<: *b}"
    assert parse_yaml(text)["c"] == yaml.safe_load(text)["c"] == {"x": 2}


def test_places_that_share_an_anchor_do_not_share_their_values() -> None:
    found = parse_written("a: &a {x: {y: 1}}\nb: *a\nc: {<<: *a}")
    found["a"]["x"]["y"] = 2
    assert core(found["b"]) == core(found["c"]) == {"x": {"y": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", r"f: y: given twice \(line 2\)"),
        ("{1: a, '1': b}", r"1: given twice"),
        ("a: {<<: 3}", r"<< \(line 1\): expected a mapping, or a list of mappings"),
        ("a: {<<: [{x: 1}, 3]}", r"<< \(line 1\): expected"),
        ("? [a]\n: b", r"a key is no text \(line 1\): found sequence"),
        ("a: &a [*a]", r"an alias stands for what it is in \(line 1\)"),
        ("!!timestamp 2024-01-01", r"unknown tag \(line 1\): found tag:yaml.org,2002:timestamp"),
        ("a: !!python/name:os.system x", r"unknown tag \(line 1\)"),
        ("!!int NO", r"'NO' is no int \(line 1\)"),
        ("[" * 3000, "not valid YAML"),
        ("a: [1\n", r"not valid YAML \(line"),
        ("a\0b", "not valid YAML"),
        ("a: 1\nb: 2\n\x1a", r"not valid YAML \(line 3\): found the character U\+001A"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_malformed_text_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_written(text, "f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["/a #b", "# b", "[a] # b", "'a' #b"])
def test_comment_is_refused_where_it_must_be_a_mistake(text: str) -> None:
    with pytest.raises(InputError, match="takes a part for a comment: found #"):
        parse_written(text, comments=False)
    assert parse_written("/a#b", comments=False) == "/a#b"


def test_number_of_very_many_digits_is_text() -> None:
    assert parse_yaml("9" * 5000) == "9" * 5000


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.from_regex(r"[-+]?[0-9._oxe:]{1,6}", fullmatch=True)
VALUES = TEXTS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)


@given(st.dictionaries(TEXTS, VALUES | st.lists(VALUES), max_size=5))
def test_what_is_written_reads_back_to_the_same_values(value: dict[str, object]) -> None:
    found = parse_yaml(yaml_text(value))
    assert found == value
    assert list(map(type, found.values())) == list(map(type, value.values()))


@given(TEXTS)
def test_text_that_is_written_is_text_to_every_version_of_yaml(text: str) -> None:
    assert parse_written(yaml_text([text])) == [text]
    assert yaml.safe_load(yaml_text([text])) == [text]
