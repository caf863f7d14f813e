"""Sample keys: short as ever for plain names, and never the same for two runs."""

from __future__ import annotations

from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from trainer.data.keys import MOST_CHARACTERS, file_stems, sample_keys

names = st.text(st.sampled_from(list("aAb1_-. ~%:?/*[]{}'\"\\é映画\u0301\n")), min_size=1, max_size=5)
runs = st.lists(st.tuples(names, names, st.none() | st.integers(1, 3)), max_size=8, unique=True)


@given(runs)
def test_no_two_runs_have_the_same_key_and_all_keys_are_safe(runs: list[tuple[str, str, int | None]]) -> None:
    keys = sample_keys(runs)
    assert len(set(keys)) == len(runs)
    assert all(set(key) <= set("aAbc1234567890ABCDEF_-~%runsXYZ") and "." not in key for key in keys)


@given(runs)
def test_series_run_and_repeat_can_be_read_back_from_a_long_key(runs: list[tuple[str, str, int | None]]) -> None:
    for run, key in zip(runs, sample_keys(runs), strict=True):
        if "~" in key:
            series, name, *repeat = (unquote(part, errors="surrogateescape") for part in key.split("~"))
            assert (series, name, int(repeat[0]) if repeat else None) == run


def test_keys_of_plain_names_are_what_they_always_were() -> None:
    runs = [("friends", "s01e02a", None), ("movie10", "life-01", 2), ("s", "a b.c", None), ("s", "Film", None)]
    keys = ["friends_s01e02a", "movie10_life-01_run-2", "s_a_b_c", "s_Film"]
    assert sample_keys(runs) == keys
    assert sample_keys([*runs, ("s", "film", None), ("s", "a映", None)])[:4] == keys


def test_a_short_key_belongs_to_the_run_that_is_spelt_like_it() -> None:
    assert sample_keys([("s", "a.b", None), ("s", "a_b", None), ("s", "a:b", None)]) == ["s~a%2Eb", "s_a_b", "s~a%3Ab"]
    assert sample_keys([("s_a", "b", None), ("s", "a_b", None)]) == ["s_a~b", "s~a_b"]
    assert sample_keys([("s", "a", 1), ("s", "a_run-1", None)]) == ["s~a~1", "s~a_run-1"]


def test_runs_that_differ_outside_of_ascii_have_keys_of_their_own() -> None:
    assert sample_keys([("s", "a映", None), ("s", "a画", None)]) == ["s~a%E6%98%A0", "s~a%E7%94%BB"]
    assert sample_keys([("s", "a\udce6", None)]) == ["s~a%E6"]  # a file name that is not UTF-8


def test_files_are_named_by_keys_that_every_file_system_tells_apart() -> None:
    assert file_stems(["s_a", "s_b"]) == ["s_a", "s_b"]
    long = ["s_" + "x" * 300 + end for end in "ab"]
    stems = file_stems(["s_Film", "s_film", "s_a", *long])
    assert len({stem.lower() for stem in stems}) == 5 and stems[2] == "s_a"
    assert all(len(stem) <= MOST_CHARACTERS for stem in stems)
