"""A cast that overflows is refused, and one that rounds a column's variation away is judged over all runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.casts import LARGEST, check_rounding, remarks, rounded_away, stored
from trainer.data.manifest import Moments
from trainer.errors import InputError

RNG = np.random.default_rng(5)


def judge(runs: list[np.ndarray], dtype: str = "float16") -> list[str]:
    """The remarks about some runs (T, D) that are cast to `dtype`."""
    casts = [stored(run, dtype, "a.h5: x") for run in runs]
    if casts[0].values is None:
        return []
    values = Moments.stack([cast.values for cast in casts])  # type: ignore[misc]
    error = Moments.stack([cast.error for cast in casts])  # type: ignore[misc]
    return check_rounding("m/x", dtype, rounded_away(values, error), "Do something.")


def noise(columns: int, scale: float = 1.0, mean: float = 0.0, dtype: str = "float32") -> np.ndarray:
    return (mean + scale * RNG.standard_normal((50, columns))).astype(dtype)


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        (np.full((4, 3), 70000.0), "float16", "overflows float16: found 70000, expected at most 65504. Do it."),
        (np.full((4, 3), -70000), "float16", "overflows float16: found 70000"),
        (np.full((4, 3), np.iinfo(np.int64).min), "float16", "overflows float16: found 9.22337e+18"),
        (np.full((4, 3), -1.8e307), "float32", "too large to compute with"),
        (np.full((4, 3), np.longdouble("-1e4000")), "float32", "found -inf at TR 0, column 0"),
        (np.full((4, 3), 1e20, ">f8"), "float32", "found 1e+20 at TR 0, column 0, expected at most 1.8e+19. 12 such"),
        (np.full((4, 3), 9.96921e36, "f4"), "float32", "found 9.96921e+36"),
        (np.full((4, 3), np.finfo("f4").min), "float32", "found -3.40282e+38"),
        (np.full((4, 2, 3), 1e20), "float16", "found 1e+20 at TR 0, column 0"),
    ],
)
def test_a_number_that_no_cast_can_hold_is_named(values: np.ndarray, dtype: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        stored(values, dtype, "a.h5: x", "Do it.")
    assert str(caught.value).startswith("a.h5: x: ") and words in str(caught.value)


@given(st.floats(-LARGEST, LARGEST, width=32), st.sampled_from(["<f4", ">f8", "g"]))
def test_every_other_number_is_stored_as_numpy_casts_it(number: float, dtype: str) -> None:
    found = stored(np.full((3, 2), number, dtype), "float32", "x").array
    np.testing.assert_array_equal(found, np.full((3, 2), number, np.float32))
    assert found.dtype == np.dtype("float32") and found.flags.c_contiguous


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (noise(6, 1e-9), "float16"),
        (noise(6, 0.01, 1000), "float16"),
        (np.concatenate([noise(5), noise(1, 0.01, 1000)], 1), "float16"),
        (np.concatenate([noise(4), noise(2, 1e-9)], 1), "float16"),
        (np.concatenate([noise(599), noise(1, 0.01, 1000)], 1), "float16"),
        (np.concatenate([noise(540), noise(60, 1, 200)], 1), "float16"),
        (noise(6, 1, 1e9, "float64"), "float32"),
        (noise(6, 1e-50, 0, "float64"), "float32"),
        ((2**30 + RNG.integers(0, 9, (50, 6))), "float32"),
    ],
    ids=[
        "small scale",
        "large mean",
        "one large mean",
        "a part",
        "one ruined of 600",
        "a tenth",
        "float64 mean",
        "float64 scale",
        "integers",
    ],
)
def test_variation_that_is_rounded_away_is_refused(run: np.ndarray, dtype: str) -> None:
    with pytest.raises(InputError, match=rf"m/x: {dtype} rounds more than 1% .* columns that vary .*Do something"):
        judge([run, run], dtype)


@pytest.mark.parametrize(
    "runs",
    [
        [noise(600)],
        [noise(600, 3, 20)],
        [noise(600, 1e-9).astype(np.float16).astype(np.float32)],
        [noise(600, 0.01, 1000).astype(np.float16).astype(np.float64)],
        [noise(600, 1e-3)],
        [np.full((50, 600), 1000.1)],
        [np.full((50, 600), 1e-9)],
        [np.maximum(noise(600) - 3, 0)],
        [np.zeros((50, 600))],
        [noise(600), noise(600, 1e-9)],
        [noise(600), np.full((50, 600), 0.1)],
        [np.arange(50 * 600).reshape(50, 600) % 7],
    ],
    ids=["normal", "mean", "small float16", "mean float16", "milli", "constant", "small constant", "sparse", "zero",
         "a silent run", "a constant run", "integers"],
)  # fmt: skip
def test_sound_features_pass_without_a_word(runs: list[np.ndarray]) -> None:
    assert judge(runs) == []


def test_a_unit_that_hardly_ever_fires_is_named_and_refuses_nothing() -> None:
    values = noise(600)
    values[:, 17] = 1e-8 * RNG.random(50)
    (remark,) = judge([values])
    assert "of 1 column(s) away (column 17 has mean " in remark and remark.endswith("Do something.")


def test_a_few_columns_that_are_rounded_but_not_ruined_are_named_and_refuse_nothing() -> None:
    values = noise(64)
    values[:, 17] += 200
    (remark,) = judge([values])
    assert "of 1 column(s) away (column 17 has mean 200 and standard deviation " in remark


def test_a_unit_that_is_silent_in_one_run_and_fires_in_another_is_sound() -> None:
    silent, loud = noise(6), noise(6)
    silent[:, 2] = 1e-8 * RNG.random(50)
    assert judge([silent, loud]) == []


def test_layers_are_judged_each_by_itself() -> None:
    layers = np.stack([noise(4, 0.01, 1000), noise(4, 0.01, -1000)], 1)
    with pytest.raises(InputError, match="8 of 8 columns"):
        judge([layers])


def test_the_verdict_does_not_depend_on_how_runs_are_grouped() -> None:
    runs = [noise(5, 0.1 * i, 200) for i in range(1, 7)]
    casts = [stored(run, "float16", "x") for run in runs]
    values, error = ([getattr(cast, part) for cast in casts] for part in ("values", "error"))
    whole = rounded_away(Moments.stack(values), Moments.stack(error))
    parts = [
        Moments.concatenate([Moments.stack(each[:2]), Moments.stack(each[2:3]), Moments.stack(each[3:])])
        for each in (values, error)
    ]
    assert whole == rounded_away(*parts) and whole.harmed == 5


def test_zeros_and_marks_for_missing_values_are_named() -> None:
    assert remarks(np.zeros((5, 3), np.float16), False) == ["all values are 0"]
    values = noise(6)
    assert remarks(values, True) == []
    values[7:9] = 0
    assert remarks(values, False) == []
    assert remarks(values, True) == ["all parcels are 0 in 2 of 50 TRs, the first is TR 7"]
    values[3, 2] = -999
    assert "1 value(s) are -999, far from all others: do they stand for missing ones?" in remarks(values, False)
    halves = values.astype(np.float16)
    halves[3, 2] = -9999
    assert "1 value(s) are -9999, far from all others: do they stand for missing ones?" in remarks(halves, False)
    assert remarks(np.arange(-999, 999, dtype=np.float32)[:, None] - 0.0, False) == []
