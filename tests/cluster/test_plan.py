"""What is still to be done of a run, and what the jobs will read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.conftest import MakePlan
from trainer.cluster.limits import Limits
from trainer.cluster.plan import Plan, make_plan, split_overrides
from trainer.config import load_config
from trainer.errors import InputError
from trainer.run import jobs as queue
from trainer.run.jobs import JobState, Standing

SUBMITTED = [("stage1", "12", "train", 1), ("evaluate1", "13", "evaluate", 1), ("stage2", "14", "train", 2)]


@pytest.fixture
def in_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier submission of which stage 1 and its worker are left in the queue."""
    jobs = [queue.Job(name, job_id, kind, stage, time.time()) for name, job_id, kind, stage in SUBMITTED]
    queue.record(tmp_path / "run", jobs)
    states = {"12": JobState("RUNNING"), "13": JobState("PENDING"), "14": JobState("CANCELLED")}
    standing = {1: Standing("running", ("12",)), 2: Standing("failed", ("14",))}
    monkeypatch.setattr(queue, "states", lambda ids: {job_id: states[job_id] for job_id in ids})
    monkeypatch.setattr(queue, "standing", lambda run, number: standing[number])


def names(plan: Plan) -> list[str]:
    return [job.key for job in plan.jobs]


def test_a_new_run_gets_all_jobs_and_no_notes(make: MakePlan) -> None:
    plan = make()
    assert names(plan) == ["stage1", "evaluate1", "stage2", "evaluate2", "report"]
    assert plan.notes == []
    assert plan.home.is_absolute()


def test_overrides_of_the_jobs_and_of_the_training_are_told_apart() -> None:
    given = ["stage1.lr=1e-3", "slurm.stage1.nodes=2", "seed=1"]
    assert split_overrides(given) == (["stage1.lr=1e-3", "seed=1"], ["stage1.nodes=2"])


def test_the_jobs_read_what_was_submitted_whatever_becomes_of_the_file(make: MakePlan) -> None:
    plan = make("{}", "seed=7")
    plan.prepare()
    (path,) = plan.configs
    assert f"--config {path}" in " ".join(plan.jobs[0].elements[0].argv)
    assert load_config(path).seed == 7


def test_another_configuration_gets_another_file_and_the_same_one_the_same(make: MakePlan) -> None:
    files = []
    for seed in (7, 8, 7):
        plan = make("{}", f"seed={seed}")
        plan.prepare()
        files += [path.name for path in plan.configs]
    assert files == ["config_1.yaml", "config_2.yaml", "config_1.yaml"]


@pytest.mark.usefixtures("in_queue")
def test_stage_2_waits_for_the_stage_1_that_is_in_the_queue(make: MakePlan) -> None:
    plan = make()
    assert names(plan) == ["stage2", "evaluate2", "report"]
    assert plan.jobs[0].waits[0].id == "12"
    assert plan.notes == [
        "stage 1: in the queue as job 12 of an earlier submission; nothing to do",
        "stage 2: goes on from its newest checkpoint",
    ]


def test_a_training_outside_of_the_queue_is_not_disturbed(make: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "standing", lambda run, number: Standing("running"))
    with pytest.raises(InputError, match="no job of this pipeline"):
        make()


def test_shards_are_made_where_there_are_none(make: MakePlan, tmp_path: Path, debug_config: Path) -> None:
    layout = debug_config.parent / "datasets" / "algonauts2025.yaml"
    plan = make(f"{{shards: {{layout: {layout}, root: {tmp_path}}}}}", f"data.shards={tmp_path / 'none'}")
    assert names(plan)[0] == "shards"
    argv = plan.jobs[0].elements[0].argv
    assert argv[argv.index("--out") + 1] == str(tmp_path / "none")
    assert argv[argv.index("--features") + 1 :] == ("llama_3.2_3b/layers.11", "whisper/layers.12")
    assert names(make(f"{{shards: {{layout: {layout}, root: {tmp_path}}}}}"))[0] == "stage1"


def test_no_shards_and_no_way_to_make_them_is_an_error(make: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.shards: .* holds no shards .* set shards\.layout"):
        make("{}", f"data.shards={tmp_path / 'none'}")


def test_a_bad_key_of_the_training_is_found_before_anything(make: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stage1\.lrr: unknown key"):
        make("{}", "stage1.lrr=3")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_has_nothing_to_do(make: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "standing", lambda run, number: Standing("finished"))
    plan = make()
    assert (plan.jobs, plan.configs) == ([], {})
    assert plan.notes == ["stage 1: finished; nothing to do", "stage 2: finished; nothing to do"]


def test_a_started_stage_is_not_continued_with_another_configuration(
    make: MakePlan, tmp_path: Path, debug_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "standing", lambda run, n: Standing("failed", ("3",)) if n == 1 else Standing("free"))
    started = tmp_path / "run" / "stage1" / "config.yaml"
    started.parent.mkdir(parents=True)
    started.write_text(load_config(debug_config, [f"data.shards={tmp_path / 'shards'}"]).to_yaml())
    assert names(make("{}", "checkpoint.every_steps=7"))[0] == "stage1"
    with pytest.raises(InputError, match=r"other values of stage1\.lr"):
        make("{}", "stage1.lr=3")


def test_a_sweep_is_job_arrays_of_runs_with_configurations_of_their_own(make: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2]}")
    plan = make("{}", "stage1.lr=3e-3", array=tmp_path / "sweep.yaml")
    assert names(plan)[0] == "stage1" and [len(job.elements) for job in plan.jobs if job.kind == "train"] == [2, 2]
    assert [path.relative_to(tmp_path).as_posix() for path in plan.configs] == [
        "run/seed=1/slurm/config_1.yaml",
        "run/seed=2/slurm/config_1.yaml",
    ]
    plan.prepare()
    read = [load_config(path) for path in plan.configs]
    assert [(config.seed, config.stage1.lr) for config in read] == [(1, 3e-3), (2, 3e-3)]
    assert plan.jobs[-1].elements[0].argv == ("sweep", str(tmp_path / "run"), "--report")
    assert not plan.is_one_run


def test_more_jobs_than_slurm_takes_are_refused_before_anything_is_made(make: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2, 3]}")

    def plan(jobs: int) -> Plan:
        return make("account: mine", array=tmp_path / "sweep.yaml", ask=lambda _: Limits(jobs=jobs, name="X is 12"))

    with pytest.raises(
        InputError, match=r"sweep\.yaml: gives more jobs than SLURM takes: found 13 .* at most 12 \(X is"
    ):
        plan(12)
    assert not (tmp_path / "run").exists()
    assert sum(len(job.elements) for job in plan(13).jobs) == 13 and plan(13).notes == []


def test_slurm_is_asked_for_its_limits_where_several_runs_are_submitted_to_it(make: MakePlan, tmp_path: Path) -> None:
    asked: list[str | None] = []

    def ask(account: str | None) -> Limits:
        asked.append(account)
        return Limits(array=2)

    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2, 3]}")
    make("account: mine", ask=ask)
    assert asked == []
    plan = make("account: mine", array=tmp_path / "sweep.yaml", ask=ask)
    assert asked == ["mine"]
    assert [len(job.elements) for job in plan.jobs if job.kind == "train"] == [2, 2, 1, 1]
    default = "SLURM's default, as scontrol does not tell MaxArraySize"
    assert plan.notes == [f"job arrays of at most 2 runs each: {default}"]
    here = make("account: mine", array=tmp_path / "sweep.yaml", ask=None)
    assert [len(job.elements) for job in here.jobs if job.kind == "train"] == [3, 3]


def test_what_is_done_of_a_sweep_is_said_by_run(
    make: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2]}")
    monkeypatch.setattr(queue, "standing", lambda run, number: Standing("finished" if run.name == "seed=1" else "free"))
    plan = make("{}", array=tmp_path / "sweep.yaml")
    assert plan.notes == ["seed=1, stage 1: finished; nothing to do", "seed=1, stage 2: finished; nothing to do"]
    assert {element.run.name for job in plan.jobs if job.kind == "train" for element in job.elements} == {"seed=2"}


def test_one_stage_2_a_subject_stands_behind_the_stage_1_of_all(
    debug_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "site.yaml").write_text("{}")
    overrides = [f"data.shards={tiny_shards}", "stage2.subjects=separate"]
    plan = make_plan(debug_config, tmp_path / "site.yaml", tmp_path / "run", overrides)
    stage1, stage2 = (next(job for job in plan.jobs if job.name == name) for name in ("stage1", "stage2"))
    assert [element.run.name for element in stage1.elements] == ["run"]
    assert [element.run.name for element in stage2.elements] == [f"subject_{label}" for label in "1235"]
    assert [(wait.condition, wait.key) for wait in stage2.waits] == [("afterok", "stage1")]
    plan.prepare()
    assert all((element.run / "stage1").is_symlink() for element in stage2.elements)
    (of_3,) = (path for path in plan.configs if "subject_3" in path.parts)
    assert load_config(of_3).datasets["val"].filter.subjects == ["3"]
