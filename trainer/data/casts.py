"""Arrays as the shards store them: cast, checked after the cast, and measured for what the cast rounds away.

A cast can do harm in three ways. A number that is too large becomes infinite; a mark for "missing" such as 1e20 stays a
number, but an absurd one. And a column whose scale is too small for float16, or that hardly varies around a large mean,
is rounded until little of its variation is left. The last can be judged only over all runs (a unit may be silent in
one), so each run gives the moments of its values and of the error, and `rounded_away` judges their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.manifest import Moments
from trainer.errors import InputError

LARGEST = float(np.sqrt(np.finfo(np.float32).max))
"""Beyond 1.8e19 the square of a number overflows float32: no loss, variance or correlation can be computed of it."""

LOST = 0.01
"""Of a column's standard deviation: a cast whose error deviates by more has harmed the column."""

SILENT = 1e-4
"""Of the median standard deviation of the columns: one that varies less counts as constant in training."""

RUINED = 0.5
"""Of a column's standard deviation: where the error deviates by more, little of the column is left."""

FEW = 0.05
"""Of the columns of a stream: so many may be harmed, but not ruined, before the stream is refused."""

FEW_SILENT = 0.25
"""Of all columns that vary: so many may be silent and harmed. More are a part of the stream in a unit of its own."""

_NO_VARIATION = 1e-12
"""Of a column's mean: a standard deviation below it is the rounding of sums in float64."""

_MARKS = (-999.0, -9999.0, -99999.0, -32768.0, -2147483648.0, 9999.0, 99999.0)
"""Numbers that programs write where a value is missing."""


@dataclass(frozen=True)
class Stored:
    """An array as it is stored, and, where the cast can round, moments of each column before it and of its error."""

    array: np.ndarray
    values: Moments | None = None
    error: Moments | None = None


def stored(
    values: np.ndarray, dtype: str, where: str, fix: str | None = None, columns: np.ndarray | None = None
) -> Stored:
    """Cast an array (T, ...) and look at what has become of it.

    Args:
        columns: how the columns are called, where some are left out.
        fix: what to do where a number is too large for `dtype` but not for float32.

    Raises:
        InputError: a number that overflows, or whose square float32 cannot hold.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(values.astype(dtype))
    limit = min(float(np.finfo(dtype).max), LARGEST)
    absurd = ~(np.abs(array) <= limit)
    if absurd.any():
        largest = max(abs(_number(values.max())), abs(_number(values.min())))
        if largest <= LARGEST:
            raise InputError(where, f"overflows {dtype}", found=f"{largest:g}", expected=f"at most {limit:g}", fix=fix)
        at = tuple(int(i) for i in np.argwhere(absurd)[0])
        column = at[-1] if columns is None else columns[at[-1]]
        raise InputError(
            where,
            "a number that is too large to compute with, as marks for missing values are",
            found=f"{_number(values[at]):g} at TR {at[0]}, column {column}",
            expected=f"at most {LARGEST:.2g}",
            fix=f"{int(absurd.sum())} such value(s) in all.",
        )
    if np.can_cast(values.dtype, array.dtype, "safe"):
        return Stored(array)
    before = values.reshape(len(values), -1).astype(np.float64)
    return Stored(array, Moments.of(before), Moments.of(array.reshape(len(array), -1) - before))


def _number(value: np.generic) -> float:
    """As a float; those of longer types that float64 cannot hold become infinite."""
    with np.errstate(over="ignore"):
        return float(value)


def remarks(array: np.ndarray, bold: bool) -> list[str]:
    """What is odd about a stored array (T, ...) but may be right: nothing but zeros, a mark for missing values."""
    if not array.any():
        return ["all values are 0"]
    found = []
    if bold and not (filled := array.any(1)).all():
        zero = ~filled
        found.append(f"all parcels are 0 in {int(zero.sum())} of {len(array)} TRs, the first is TR {zero.argmax()}")
    with np.errstate(over="ignore"):
        marks = {float(array.dtype.type(mark)): mark for mark in _MARKS}
    wide = array.astype(np.float32, copy=False)  # numpy looks for extremes in it 20 times as fast as in float16
    for mark in {float(wide.min()), float(wide.max())} & set(marks):
        marked = array == array.dtype.type(mark)
        if 10 * float(np.abs(array[~marked]).max(initial=0)) < abs(mark):
            what = f"{int(marked.sum())} value(s) are {marks[mark]:g}, far from all others"
            found.append(f"{what}: do they stand for missing ones?")
    return found


@dataclass(frozen=True)
class Harm:
    """What casts did to the columns of an array.

    Attributes:
        harmed: how many columns lost more than LOST of their variation.
        ruined: how many of these lost more than RUINED of it.
        silent: how many are harmed too, but vary too little beside the others for training to see them.
        judged, varying: how many columns vary enough for training to see them, and at all.
        worst: the column that lost most, in words.
    """

    harmed: int
    ruined: int
    silent: int
    judged: int
    varying: int
    worst: str

    @property
    def is_too_much(self) -> bool:
        """Whether a column is ruined, or more than a few are harmed."""
        return self.ruined > 0 or self.harmed > FEW * self.judged or self.silent > FEW_SILENT * self.varying


def rounded_away(values: Moments, error: Moments) -> Harm:
    """What casts did to columns, from the moments of all runs (R first). One that does not vary has nothing to lose."""
    before, lost = values.combine(), error.combine()
    std = before.std()
    varies = std > _NO_VARIATION * np.abs(before.mean)
    silent = std < SILENT * (np.median(std[varies]) if varies.any() else 0.0)
    share = np.where(varies, lost.std() / np.where(varies, std, 1.0), 0.0)
    worst = int(np.argmax(np.where(silent, 0.0, share) if (share * ~silent > LOST).any() else share))
    return Harm(
        harmed=int((~silent & (share > LOST)).sum()),
        ruined=int((~silent & (share > RUINED)).sum()),
        silent=int((silent & (share > LOST)).sum()),
        judged=int((varies & ~silent).sum()),
        varying=int(varies.sum()),
        worst=f"column {worst} has mean {before.mean[worst]:.3g} and standard deviation {std[worst]:.3g}",
    )


def check_rounding(where: str, dtype: str, harm: Harm, fix: str) -> list[str]:
    """Remarks about the few columns of an array that a cast has harmed. Raises InputError where they are not few."""
    count = harm.harmed + harm.silent
    if harm.is_too_much:
        raise InputError(
            where,
            f"{dtype} rounds more than {LOST:.0%} of the variation away",
            found=f"{count} of {harm.varying} columns that vary ({harm.worst})",
            expected=f"at most {FEW:.0%} of the columns, and none that loses {RUINED:.0%}, over all runs",
            fix=fix,
        )
    if not count:
        return []
    what = f"{dtype} rounds more than {LOST:.0%} of the variation of {count} column(s) away ({harm.worst})"
    return [f"{where}: {what}. {fix}"]
