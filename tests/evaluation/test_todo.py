"""What remains to be scored follows from what is listed, and from nothing else."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trainer.evaluation import lifetime
from trainer.evaluation.lifetime import FINISHED, GONE, StageState, ending
from trainer.evaluation.todo import Listed, Unit, remaining

SETS = ("val", "test", "ood")
BOTH = ("mean", "sample")
STEPS = st.frozensets(st.integers(1, 6))
UNITS = st.builds(Unit, st.integers(1, 6), st.sampled_from(SETS))
SCORES = st.tuples(UNITS, st.sampled_from(BOTH))


@st.composite
def listings(draw: st.DrawFn) -> Listed:
    scored = draw(st.frozensets(SCORES))
    full = draw(st.frozensets(st.sampled_from(sorted(scored)))) if scored else frozenset()
    return Listed(draw(STEPS), scored, full, draw(st.frozensets(UNITS)), draw(STEPS), draw(STEPS))


@given(
    listings(), st.lists(st.sampled_from(SETS), unique=True), st.sampled_from([1, 2]), st.sampled_from([None, "val"])
)
def test_each_unit_is_done_or_damaged_or_remains_once(
    listed: Listed, sets: list[str], count: int, awaited: str | None
) -> None:
    estimates = BOTH[:count]
    found = remaining(listed, tuple(sets), estimates, awaited)
    together = [*found.free, *found.claimed, *found.later]
    assert len(set(together)) == len(together)
    for unit in (Unit(step, name) for step in range(1, 7) for name in SETS):
        done = all((unit, estimate) in listed.full for estimate in estimates)
        there = unit.step in listed.steps and unit.step not in listed.damaged and unit.set_name in sets
        assert (unit in together) == (there and not done)
    for units in (found.free, found.claimed, found.later):
        assert list(units) == sorted(units, key=lambda unit: (unit.step, sets.index(unit.set_name)))
    assert not listed.claimed.intersection(found.free) and listed.claimed.issuperset(found.claimed)
    assert set(found.leftover) == listed.claimed.difference(together)
    validates = [unit for unit in found.later if unit.step not in listed.unsettled]
    assert validates in ([], [Unit(max(listed.steps, default=0), awaited or "")])
    assert not any((unit, "mean") in listed.scored for unit in validates)


@given(listings(), st.randoms(use_true_random=False))
def test_what_is_scored_leaves_the_rest_as_it_is_until_nothing_remains(listed: Listed, random: object) -> None:
    found = remaining(listed, SETS, BOTH, None)
    while found.free or found.claimed:
        unit = random.choice(found.free + found.claimed)  # type: ignore[attr-defined]
        scores = {(unit, estimate) for estimate in BOTH}
        listed = Listed(
            listed.steps, listed.scored | scores, listed.full | scores,
            listed.claimed - {unit}, listed.damaged, listed.unsettled,
        )  # fmt: skip
        after = remaining(listed, SETS, BOTH, None)
        assert after.free == tuple(each for each in found.free if each != unit)
        assert after.claimed == tuple(each for each in found.claimed if each != unit)
        assert after.later == found.later
        found = after
    assert bool(found) == bool(found.later)


ABSENT, RUNNING, DONE = StageState(False, False), StageState(True, False), StageState(True, True)
SHORT, LONG = lifetime.STALE_AFTER_S, lifetime.BEGIN_WITHIN_S


@pytest.mark.parametrize(
    ("stages", "has_lived", "patience", "status"),
    [
        ((DONE, DONE), False, 0.0, FINISHED),
        ((DONE, ABSENT), True, LONG, FINISHED),  # stage 1 alone, as nobody has begun stage 2
        ((DONE, ABSENT), False, LONG, FINISHED),
        ((RUNNING, ABSENT), True, SHORT, GONE),
        ((DONE, RUNNING), True, SHORT, GONE),
        ((DONE, RUNNING), False, LONG, GONE),  # dead when the worker came: it may be about to be resumed
        ((ABSENT, ABSENT), True, LONG, GONE),  # deleted
    ],
)
def test_a_worker_ends_when_no_more_can_come(
    stages: tuple[StageState, StageState], has_lived: bool, patience: float, status: int
) -> None:
    assert ending(stages, patience, has_lived=has_lived) == status
    if patience:
        assert ending(stages, patience - 0.1, has_lived=has_lived) is None
