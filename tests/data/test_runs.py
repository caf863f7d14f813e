"""What fits together follows from shapes alone: the length of a run, and which runs are unlike the others."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.layout import RunGroups
from trainer.data.runs import (
    MAX_TRS_APART,
    RunPlan,
    Source,
    StreamRequest,
    common_length,
    describe_stream,
    fitting_scans,
    predicted_length,
    unlike_others,
)
from trainer.errors import InputError

lengths = st.lists(st.integers(95, 105), min_size=1, max_size=4)


def sources(trs: list[int], *row: int) -> list[Source]:
    return [Source(Path(f"{n}.h5"), "data", (length, *row)) for n, length in enumerate(trs)]


def request(pool: bool = False) -> StreamRequest:
    return StreamRequest("clip/last", ("clip",), ("last",), pool, "float16")


def run(key: str, parcels: int = 10, *row: int) -> RunPlan:
    bold, features = (
        Source(Path(f"{key}_bold.h5"), "b", (9, parcels)),
        Source(Path(f"{key}.h5"), "f", (9, *(row or (4,)))),
    )
    return RunPlan(key, "films", key, 1, RunGroups(film=key), {"1": bold}, {"clip/last": features}, 9)


@given(lengths, lengths)
def test_a_run_is_cut_to_its_shortest_scan_unless_something_is_too_far_off(
    bold: list[int], features: list[int]
) -> None:
    near = max(bold) - min(bold) <= MAX_TRS_APART and all(
        min(bold) - MAX_TRS_APART <= length <= max(bold) + MAX_TRS_APART for length in features
    )
    if near:
        assert common_length(sources(bold, 10), sources(features, 4)) == min(bold)
    else:
        with pytest.raises(InputError, match="TRs, expected within 2 TRs"):
            common_length(sources(bold, 10), sources(features, 4))


@given(st.dictionaries(st.sampled_from(["1", "2", "3", "4"]), st.integers(95, 105), min_size=1), lengths)
def test_as_few_scans_as_possible_are_left_out_for_the_rest_to_fit(trs: dict[str, int], features: list[int]) -> None:
    bold = {label: Source(Path(label), "data", (n, 10)) for label, n in trs.items()}

    def fit(labels: tuple[str, ...]) -> bool:
        try:
            common_length([bold[label] for label in labels], sources(features, 4))
        except InputError:
            return False
        return True

    most = max((n for n in range(1, len(bold) + 1) if any(map(fit, combinations(bold, n)))), default=0)
    if not most:
        with pytest.raises(InputError):
            fitting_scans(bold, sources(features, 4))
        return
    out = fitting_scans(bold, sources(features, 4))
    kept = tuple(label for label in bold if label not in out)
    assert len(kept) == most and fit(kept)
    assert all("length: found" in str(error) for error in out.values())


@given(st.dictionaries(st.sampled_from(["1", "2", "3"]), st.integers(98, 102)), lengths)
def test_a_run_without_bold_is_as_long_as_is_wanted_or_as_its_shortest_stream(
    wanted: dict[str, int], features: list[int]
) -> None:
    of = list(wanted.values()) or [min(features)]
    near = max(of) - min(of) <= MAX_TRS_APART and all(
        min(of) - MAX_TRS_APART <= length <= max(of) + MAX_TRS_APART for length in features
    )
    if near:
        assert predicted_length("a", wanted, sources(features, 4)) == max(of)
    else:
        with pytest.raises(InputError, match="within 2 TRs"):
            predicted_length("a", wanted, sources(features, 4))


def test_runs_unlike_most_are_named_with_what_is_usual() -> None:
    runs = [run("a"), run("b", 11), run("c"), run("d", 10, 5)]
    odd = unlike_others(runs, [request()])
    assert {key: str(error) for key, error in odd.items()} == {
        ("b", "1"): "b_bold.h5: b: parcels: found 11, expected 10 as in a_bold.h5: b",
        ("d", ""): "d.h5: f: width: found 5, expected 4 as in a.h5: f",
    }
    assert not unlike_others([], [request()])


@pytest.mark.parametrize(
    ("shape", "pool", "stored"),
    [((9, 4), False, (1, 4)), ((9, 1, 4), False, (1, 4)), ((9, 3, 4), False, (3, 4)), ((9, 3, 4), True, (1, 4))],
)
def test_a_stream_has_the_layers_that_are_not_pooled(
    shape: tuple[int, ...], pool: bool, stored: tuple[int, int]
) -> None:
    found = describe_stream(request(pool), Source(Path("a.h5"), "f", shape))
    assert (found.layers, found.width, found.dtype) == (*stored, "float16")
