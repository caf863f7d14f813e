"""The chain on this machine: its order, its processes, what a failure cancels, and that Ctrl-C lets trainings save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import MakePlan
from tests.cluster.pretended import ROOT, Pretended
from trainer.cluster.local import _chosen_gpus, run_here, run_locally
from trainer.cluster.plan import Plan
from trainer.cluster.submission import Site

NAMES = ["stage1", "evaluate1", "stage2", "evaluate2", "report"]
TWO = "tasks_per_node: 2"


def prepared(plan: Plan, **wishes: str) -> Plan:
    """A plan whose tasks do as is wished."""
    plan.home.mkdir()
    (plan.home / "wishes.json").write_text(json.dumps(wishes))
    return plan


def notes(run: Path) -> list[dict[str, Any]]:
    path = run / "order.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def order(run: Path) -> list[str]:
    return [f"{note['what']} {note['job']}" for note in notes(run)]


@pytest.mark.slow
def test_stage_2_follows_stage_1_with_a_worker_beside_each(make: MakePlan) -> None:
    plan, lines = prepared(make(TWO)), list[str]()
    assert run_locally(plan, Site(ROOT), say=lines.append, make_task=Pretended) == 0
    found = order(plan.home)
    assert found.count("begin stage1") == found.count("begin stage2") == 2
    assert max(i for i, note in enumerate(found) if note == "end stage1") < found.index("begin stage2")
    assert found.index("end evaluate2") < found.index("begin report")
    worlds = [note["world"] for note in notes(plan.home) if (note["what"], note["job"]) == ("begin", "stage1")]
    assert {world["RANK"] for world in worlds} == {"0", "1"}
    assert {world["WORLD_SIZE"] for world in worlds} == {"2"}
    assert len({(world["MASTER_ADDR"], world["MASTER_PORT"]) for world in worlds}) == 1
    assert [line.split(": ")[1] for line in lines if line.endswith(": done")] == ["done"] * 5
    assert any(line.startswith("stage1: 2 processes, log ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "stage"), [(2, 2), (1, 1)])
def test_ranks_that_are_told_to_share_train_with_deepspeed(make: MakePlan, tasks: int, stage: int) -> None:
    settings = f"{{tasks_per_node: {tasks}, zero_stage: {stage}, stage2: {{tasks_per_node: 1, zero_stage: 0}}}}"
    plan, lines = prepared(make(settings), stage1="join"), list[str]()
    assert run_locally(plan, Site(ROOT), say=lines.append, make_task=Pretended) == 0, lines
    joined = [note["joined"] for note in notes(plan.home) if note["joined"]]
    assert sorted(facts.pop("rank") for facts in joined) == [str(rank) for rank in range(tasks)]
    assert all(facts == {"update": "Sharded", "type": "DEEPSPEED", "stage": str(stage)} for facts in joined), joined
    assert any(line.startswith("stage1: ") and f", ZeRO-{stage}, log " in line for line in lines)
    begun = [note for note in notes(plan.home) if note["world"] is not None]
    told = {note["job"]: note["world"].get("ACCELERATE_USE_DEEPSPEED") for note in begun}
    assert told == {"stage1": "true", "evaluate1": None, "stage2": "false", "evaluate2": None, "report": None}


@pytest.mark.slow
def test_when_stage_1_fails_stage_2_never_runs(make: MakePlan) -> None:
    plan, lines = prepared(make(TWO), stage1="raise"), list[str]()
    assert run_locally(plan, Site(ROOT), say=lines.append, make_task=Pretended) == 1
    assert "begin stage2" not in order(plan.home)
    assert order(plan.home)[-1] == "end report"
    assert {"stage1: failed", "    RuntimeError: made to raise"} <= set(lines)
    assert "stage2: cancelled, as what it waits for has failed" in lines


@pytest.mark.slow
def test_ctrl_c_lets_the_trainings_save_and_leaves_nobody_behind(make: MakePlan, debug_config: Path) -> None:
    plan = prepared(make(TWO), stage1="wait")
    shards = plan.home.parent / "shards"
    arguments = [str(debug_config), str(plan.source), str(plan.home), str(shards)]
    command = [sys.executable, "-m", "tests.cluster.pretended", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while order(plan.home).count("waits stage1") < 2:
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.1)
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
        said, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 128 + signal.SIGINT
    assert order(plan.home).count("saved stage1") == 2
    assert "the same command goes on from the newest checkpoint" in said
    assert "begin stage2" not in order(plan.home)
    assert not [note["pid"] for note in notes(plan.home) if Path(f"/proc/{note['pid']}/cmdline").exists()]


def test_in_this_process_the_jobs_run_in_their_order(make: MakePlan) -> None:
    plan, lines = prepared(make()), list[str]()
    before = signal.getsignal(signal.SIGTERM)
    assert run_here(plan, say=lines.append, make_task=Pretended) == 0
    assert [note["job"] for note in notes(plan.home) if note["what"] == "begin"] == NAMES
    assert {note["pid"] for note in notes(plan.home)} == {os.getpid()}
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_this_process_nothing_is_shared_and_that_is_said(make: MakePlan) -> None:
    plan, lines = prepared(make("zero_stage: 2")), list[str]()
    assert run_here(plan, say=lines.append, make_task=Pretended) == 0
    assert [line for line in lines if "zero_stage" in line] == [
        f"{name}: in this process, which shares nothing: zero_stage does not count here"
        for name in ("stage1", "stage2")
    ]
    assert not any("ACCELERATE_USE_DEEPSPEED" in (note["world"] or {}) for note in notes(plan.home))


@pytest.mark.parametrize(
    ("chosen", "gpus", "expected"),
    [
        ("3,5", 2, "3,5"), ("3, 5", 1, "3"), ("GPU-1f,GPU-2c", 2, "GPU-1f,GPU-2c"), ("3", 2, None), ("", 1, None),
        ("3", 0, None),
    ],
)  # fmt: skip
def test_the_gpus_that_somebody_chose_are_taken(
    chosen: str, gpus: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert _chosen_gpus(gpus).get("CUDA_VISIBLE_DEVICES") == expected


def test_in_this_process_a_failure_cancels_too(make: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, lines = prepared(make(), stage1="raise"), list[str]()
    monkeypatch.setenv("RANK", "1")
    assert run_here(plan, say=lines.append, make_task=Pretended) == 1
    assert [note["job"] for note in notes(plan.home) if note["what"] == "begin"] == ["stage1", "evaluate1", "report"]
    assert "stage1: failed (status 1)" in lines
