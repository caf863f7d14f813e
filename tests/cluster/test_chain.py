"""The chain as data: its order, its links, arrays, what is left out, and that every dependency can be met."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.cluster.chain import Job, Outcome, Run, Shards, Stage, Wait, dependency, next_steps, one_by_one, pipeline
from trainer.cluster.picture import picture
from trainer.cluster.settings import Settings

HOME = Path("/runs/full")
CONFIG = HOME / "slurm" / "config_1.yaml"
SHARDS = Shards(("--layout", "l.yaml", "--root", "d", "--out", "s"))


def ids_of(jobs: list[Job]) -> dict[str, str]:
    return {job.key: str(number) for number, job in enumerate(jobs, 101)}


def told(jobs: list[Job]) -> dict[str, str]:
    """What sbatch is told of each job, with keys in the place of ids."""
    return {job.key: dependency(job.waits, {other.key: other.key for other in jobs}) for job in jobs}


def test_the_chain_reads_like_what_was_asked_for() -> None:
    assert told(pipeline(HOME, [Run(HOME, CONFIG)], shards=SHARDS)) == {
        "shards": "",
        "stage1": "afterok:shards",
        "evaluate1": "afterok:shards,after:stage1",
        "stage2": "afterok:stage1",
        "evaluate2": "afterok:stage1,after:stage2",
        "report": "afterany:shards:stage1:evaluate1:stage2:evaluate2",
    }


def test_each_job_says_what_it_runs() -> None:
    words = {job.key: " ".join(job.elements[0].argv) for job in pipeline(HOME, [Run(HOME, CONFIG)], shards=SHARDS)}
    assert words == {
        "shards": "--layout l.yaml --root d --out s",
        "stage1": f"train --config {CONFIG} --run {HOME} --stage 1 --resume",
        "evaluate1": f"watch {HOME} --stage 1 --until-finished",
        "stage2": f"train --config {CONFIG} --run {HOME} --stage 2 --resume",
        "evaluate2": f"watch {HOME} --stage 2 --until-finished",
        "report": f"report {HOME}",
    }


def test_kinds_and_stages_follow_from_names() -> None:
    jobs = pipeline(HOME, [Run(HOME, CONFIG)], shards=SHARDS)
    kinds = ["shards", "train", "evaluate", "train", "evaluate", "report"]
    assert [(job.kind, job.stage) for job in jobs] == list(zip(kinds, [None, 1, 1, 2, 2, None], strict=True))


def test_links_follow_each_other_and_stage_2_follows_the_last() -> None:
    jobs = pipeline(HOME, [Run(HOME, CONFIG)], links=3)
    assert told(jobs) == {
        "stage1": "",
        "stage1.2": "afterany:stage1",
        "stage1.3": "afterany:stage1.2",
        "evaluate1": "after:stage1",
        "stage2": "afterok:stage1.3",
        "stage2.2": "afterok:stage1.3,afterany:stage2",
        "stage2.3": "afterok:stage1.3,afterany:stage2.2",
        "evaluate2": "afterok:stage1.3,after:stage2",
        "report": "afterany:stage1:stage1.2:stage1.3:evaluate1:stage2:stage2.2:stage2.3:evaluate2",
    }
    assert [(job.link, job.links, job.earlier) for job in jobs[:3]] == [
        (1, 3, ()),
        (2, 3, ("stage1",)),
        (3, 3, ("stage1", "stage1.2")),
    ]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({1: Stage("finished"), 2: Stage("finished")}, {}),
        ({1: Stage("running", "12", "13"), 2: Stage("running", "14", "15")}, {}),
        (
            {1: Stage("finished"), 2: Stage("failed")},
            {"stage2": "", "evaluate2": "after:stage2", "report": "afterany:stage2:evaluate2"},
        ),
        (
            {1: Stage("running", "12", "13"), 2: Stage("free")},
            {
                "stage2": "afterok:12",
                "evaluate2": "afterok:12,after:stage2",
                "report": "afterany:12:13:stage2:evaluate2",
            },
        ),
        (
            {1: Stage("running", "12"), 2: Stage("running", "14", "15")},
            {"evaluate1": "after:12", "report": "afterany:12:14:15:evaluate1"},
        ),
    ],
    ids=["finished", "running", "stage 2 failed", "stage 1 running", "a worker is missing"],
)
def test_what_is_finished_or_running_is_left_alone(stages: dict[int, Stage], expected: dict[str, str]) -> None:
    assert told(pipeline(HOME, [Run(HOME, CONFIG, stages)])) == expected


def test_shards_that_an_earlier_job_makes_are_waited_for() -> None:
    assert told(pipeline(HOME, [Run(HOME, CONFIG)], shards=Shards(id="7")))["stage1"] == "afterok:7"


def test_runs_that_need_the_same_are_one_array_and_have_a_worker_each() -> None:
    runs = [Run(HOME / name, CONFIG) for name in "ab"]
    jobs = pipeline(HOME, runs)
    assert told(jobs) == {
        "stage1": "",
        "evaluate1.a": "after:stage1_0",
        "evaluate1.b": "after:stage1_1",
        "stage2": "aftercorr:stage1",
        "evaluate2.a": "afterok:stage1_0,after:stage2_0",
        "evaluate2.b": "afterok:stage1_1,after:stage2_1",
        "report": "afterany:stage1:evaluate1.a:evaluate1.b:stage2:evaluate2.a:evaluate2.b",
    }
    assert [element.run.name for element in jobs[0].elements] == ["a", "b"]


def test_arrays_hold_the_same_runs_in_the_same_order_where_some_have_finished() -> None:
    needs = {"a": Stage(), "b": Stage("finished"), "c": Stage(), "d": Stage("running", "9_1")}
    jobs = pipeline(HOME, [Run(HOME / name, CONFIG, {1: stage, 2: Stage()}) for name, stage in needs.items()])
    by_key = {job.key: job for job in jobs}
    for job in jobs:
        for wait in job.waits:
            if wait.condition == "aftercorr":
                assert [e.run for e in by_key[wait.key].elements] == [e.run for e in job.elements]
    trained = {element.run.name: job for job in jobs if job.name == "stage2" for element in job.elements}
    assert set(trained) == set("abcd")
    assert trained["a"] is trained["c"]
    assert (trained["b"].waits, trained["d"].waits) == ((), (Wait("afterok", id="9_1"),))


def test_arrays_that_would_be_too_long_are_several_each_with_its_own_stage_2() -> None:
    runs = [Run(HOME / name, CONFIG) for name in "abcde"]
    jobs = pipeline(HOME, runs, links=2, longest=2)
    trainings = {job.key: "".join(e.run.name for e in job.elements) for job in jobs if job.kind == "train"}
    assert trainings == {
        **{"stage1": "ab", "stage1.2": "ab", "stage2": "ab", "stage2.2": "ab"},
        **{"stage1+2": "cd", "stage1+2.2": "cd", "stage2+2": "cd", "stage2+2.2": "cd"},
        **{"stage1+3": "e", "stage1+3.2": "e", "stage2+3": "e", "stage2+3.2": "e"},
    }
    waits = told(jobs)
    assert [waits[key] for key in ("stage2", "stage2+2", "stage2+3")] == [
        "aftercorr:stage1.2", "aftercorr:stage1+2.2", "afterok:stage1+3.2",
    ]  # fmt: skip
    assert waits["stage2+2.2"] == "aftercorr:stage1+2.2,afterany:stage2+2"
    assert waits["evaluate2.d"] == "afterok:stage1+2.2_1,after:stage2+2_1"
    assert waits["evaluate2"] == "afterok:stage1+3.2,after:stage2+3"
    (line,) = [line for line in picture(jobs, Settings(time=60).of, {}) if line.startswith("stage1 ")]
    assert "5 x (1 task)" in line


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12))
def test_each_element_of_stage_2_waits_for_its_own_run_whatever_the_length_of_arrays(runs: int, longest: int) -> None:
    jobs = {job.key: job for job in pipeline(HOME, [Run(HOME / str(i), CONFIG) for i in range(runs)], longest=longest)}
    stage2 = [job for job in jobs.values() if job.name == "stage2"]
    assert [e.run.name for job in stage2 for e in job.elements] == [str(i) for i in range(runs)]
    for job in stage2:
        (wait,) = job.waits
        assert 1 <= len(job.elements) <= longest
        assert [e.run for e in jobs[wait.key].elements] == [e.run for e in job.elements]
        assert wait.condition == ("aftercorr" if len(job.elements) > 1 else "afterok")


def test_a_field_for_each_subject_stands_around_one_stage_1() -> None:
    subjects = [Run(HOME / f"subject_{n}", CONFIG, {2: Stage()}, around=HOME) for n in (1, 2)]
    jobs = pipeline(HOME, [Run(HOME, CONFIG, {1: Stage()}), *subjects])
    assert told(jobs)["stage2"] == "afterok:stage1"
    assert told(jobs)["evaluate2.subject_2"] == "afterok:stage1,after:stage2_1"


STANDINGS = st.sampled_from(
    [Stage(), Stage("failed"), Stage("finished"), Stage("running", "5"), Stage("running", "6", "7")]
)


@st.composite
def chains(draw: st.DrawFn) -> list[Job]:
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True))
    runs = [Run(HOME / name, CONFIG, {1: draw(STANDINGS), 2: draw(STANDINGS)}) for name in names]
    shards = draw(st.sampled_from([None, SHARDS, Shards(id="3")]))
    longest = draw(st.sampled_from([None, 1, 2, 3]))
    return pipeline(HOME, runs, shards=shards, links=draw(st.integers(1, 4)), longest=longest)


@settings(max_examples=30, deadline=None)
@given(chains())
def test_every_dependency_is_submitted_before(jobs: list[Job]) -> None:
    known: dict[str, Job] = {}
    for job in jobs:
        for wait in job.waits:
            assert bool(wait.key) != bool(wait.id)
            if wait.key:
                assert wait.key in known
                assert wait.element is None or wait.element < len(known[wait.key].elements)
        assert job.key not in known
        known[job.key] = job
        assert set(job.earlier) <= set(known)
    assert not jobs or [job.name for job in jobs].count("report") == 1


@settings(max_examples=30, deadline=None)
@given(chains())
def test_all_that_is_needed_is_trained_once_and_stage_2_behind_stage_1(jobs: list[Job]) -> None:
    firsts = [job for job in jobs if job.kind == "train" and job.link == 1]
    trained = [(element.run, job.stage) for job in firsts for element in job.elements]
    assert len(trained) == len(set(trained))
    for job in firsts:
        begins = [wait for wait in job.waits if wait.condition in ("afterok", "aftercorr")]
        if job.stage == 2 and any((element.run, 1) in trained for element in job.elements):
            assert begins and all(known.link == known.links for known in jobs if known.key == begins[0].key)


@settings(max_examples=30, deadline=None)
@given(chains(), st.data())
def test_without_slurm_the_chain_ends_and_keeps_every_condition(jobs: list[Job], data: st.DataObject) -> None:
    alone = one_by_one(jobs)
    assert all(len(job.elements) == 1 and job.links == 1 for job in alone)
    outcomes: dict[str, Outcome] = {}
    began: list[str] = []
    for _ in itertools.count():
        steps = next_steps(alone, outcomes)
        for key, step in steps.items():
            outcomes[key] = "running" if step == "start" else "cancelled"
            began += [key] if step == "start" else []
        running = [key for key, outcome in outcomes.items() if outcome == "running"]
        if not running and not steps:
            break
        if not running:
            continue
        outcomes[data.draw(st.sampled_from(running))] = data.draw(st.sampled_from(["ok", "failed"]))
    assert set(outcomes) == {job.key for job in alone}
    for job in alone:
        for wait in job.waits:
            if wait.key and wait.condition == "afterok":
                assert (job.key in began) <= (outcomes[wait.key] == "ok")
            if wait.key and job.key in began and wait.key in began:
                assert began.index(wait.key) < began.index(job.key)


def test_the_picture_is_a_tree_of_names_ids_sizes_and_conditions() -> None:
    asked = Settings(nodes=2, tasks_per_node=4, time=720)
    jobs = pipeline(HOME, [Run(HOME, CONFIG)], shards=SHARDS)
    assert picture(jobs, asked.of, ids_of(jobs)) == [
        "shards               101   1 task        12 h",
        "└─ stage1            102   2 x 4 tasks   12 h     if shards ends well; else cancelled",
        "   ├─ evaluate1      103   1 task        12 h     starts with stage1, ends when all is scored",
        "   └─ stage2         104   2 x 4 tasks   12 h     if stage1 ends well; else cancelled",
        "      └─ evaluate2   105   1 task        12 h     starts with stage2, ends when all is scored",
        "report               106   1 task        30 min   when all of them have ended",
    ]


def test_links_and_arrays_are_one_line_each() -> None:
    jobs = pipeline(HOME, [Run(HOME / name, CONFIG) for name in "abc"], links=2)
    lines = picture(jobs, Settings(time=60).of, ids_of(jobs))
    names = ["stage1", "evaluate1", "stage2", "evaluate2", "report"]
    assert [next(word for word in line.split() if word.isalnum()) for line in lines] == names
    assert "101-102" in lines[0] and "3 x (1 task)" in lines[0] and "2 links" in lines[0]
    assert "103-105" in lines[1] and "3 x (1 task)" in lines[1]
