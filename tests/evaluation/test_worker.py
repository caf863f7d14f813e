"""Workers share what there is to score: each piece once, none missed, whoever dies, deletes or is still writing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.evaluation.conftest import HURRY, add_checkpoint, make_crowd
from tests.ranks import ThreadRank, on_ranks
from trainer.cli import main
from trainer.evaluation import held, lifetime, todo, worker
from trainer.evaluation.worker import Task, Worker
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint
from trainer.run.directory import RunDirectory
from trainer.run.files import read_json, write_json
from trainer.run.signals import StopRequest
from trainer.scoring.shares import OneProcess

ROOT = Path(__file__).resolve().parents[2]
ALONE = OneProcess(torch.device("cpu"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WAIT_S = 400

WATCH = f"""
import importlib, os, sys, time
for module, values in { ({module.__name__: values for module, values in HURRY.items()})!r}.items():
    for name, value in values.items():
        setattr(importlib.import_module(module), name, value)
from trainer.evaluation import held, lifetime
lifetime.BEGIN_WITHIN_S *= float(os.environ.get("PATIENCE", 1))
score_checkpoint = held.score_checkpoint
def slowly(*arguments, **options):
    time.sleep(0.1)
    score_checkpoint(*arguments, **options)
held.score_checkpoint = slowly
from trainer.cli import main
sys.exit(main(sys.argv[1:]))
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `python -m trainer ...` with short waits; what it says goes to a file, and it ends with the test."""
    processes = []

    script = tmp_path / "watch.py"
    script.write_text(WATCH)

    def start(*arguments: object, world: int = 1, patience: int = 1) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [sys.executable, *(torchrun if world > 1 else []), str(script), *map(str, arguments)]
        with (tmp_path / f"said{len(processes)}").open("w") as said:
            environment = {**ENVIRONMENT, "PATIENCE": str(patience)}
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def said(tmp_path: Path) -> Counter[str]:
    """How often workers wrote each score."""
    lines = [line for path in tmp_path.glob("said*") for line in path.read_text().splitlines()]
    return Counter(line.partition(" (")[0] for line in lines if line.startswith("-- "))


def full(run: RunDirectory) -> set[tuple[int, str]]:
    return {(score["step"], score["set"]) for score in run.stage(1).read_scores() if score.get("full")}


def a_worker(run: RunDirectory, *sets: str, until_finished: bool = True, ranks: Any = ALONE) -> Worker:
    return Worker(run, list(sets) or None, ranks, StopRequest(), until_finished=until_finished)


def task_of(one: Worker) -> Task:
    turn = one.turn()
    assert isinstance(turn, Task)
    return turn


def files(run: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.stage(1).scores.iterdir()}


def damage(run: RunDirectory, step: int) -> None:
    """Turn a bit of the weights."""
    path = checkpoint.folder_of(run.stage(1).checkpoints, step) / checkpoint.MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def nothing_is_left(run: RunDirectory) -> bool:
    """No claims, and nothing held."""
    stage = run.stage(1)
    return not list(stage.claims.glob("*")) and not list(stage.checkpoints.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_two_workers_score_each_of_thirty_checkpoints_once(
    crowd: RunDirectory, start: Start, tmp_path: Path, killed: bool
) -> None:
    arguments = ["watch", crowd.path, "--set", "test", "--until-finished"]
    one, other = start(*arguments), start(*arguments)
    if killed:
        until(lambda: len(full(crowd)) >= 5)
        until(lambda: kill_while_it_scores(crowd, one))
        assert len(full(crowd)) < 28, "there was enough left to share"
    assert one.wait(WAIT_S) == (-signal.SIGKILL if killed else 0)
    assert other.wait(WAIT_S) == 0
    assert full(crowd) == {(step, "test") for step in range(1, 31)}
    wrote = said(tmp_path)
    assert set(wrote.values()) == {1} and len(wrote) >= 30 - killed, "a killed worker may die between file and line"
    shares = [len([line for line in path.read_text().splitlines() if "--" in line]) for path in tmp_path.glob("said*")]
    assert all(shares), "both had work"
    assert nothing_is_left(crowd)


def kill_while_it_scores(run: RunDirectory, process: subprocess.Popen[str]) -> bool:
    """Kill a worker, if it has a claim at this moment."""
    process.send_signal(signal.SIGSTOP)
    claims = [json.loads(path.read_text()) for path in run.stage(1).claims.glob("step*.json")]
    holds = any(claim["pid"] == process.pid for claim in claims)
    process.send_signal(signal.SIGKILL if holds else signal.SIGCONT)
    return holds


def test_the_claim_of_another_host_is_waited_for_by_our_clock_alone(
    debug_run: Path, tmp_path: Path, hurry: None
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3, 4])
    for step, offset in ((3, -3600), (4, 3600)):
        path = run.stage(1).claims / f"step_{step:08d}-test.1.json"
        write_json(path, {"host": "node7", "pid": 12, "machine": "another", "born": 1, "count": 5})
        os.utime(path, (time.time() + offset,) * 2)
    one = a_worker(run, "test")
    assert one.turn() is None and one.turn() is None, "they may live"
    began = time.monotonic()
    assert one.run_to_its_end() == 0
    assert time.monotonic() - began > 0.9, "and had their time to show it"
    assert full(run) == {(3, "test"), (4, "test")} and nothing_is_left(run)


def test_a_worker_that_was_taken_for_dead_writes_nothing(
    debug_run: Path, tmp_path: Path, hurry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    one = a_worker(run, "test")
    monkeypatch.setattr(one, "_look_up", lambda: None)  # it slept until after its last run
    task = task_of(one)
    newer = run.stage(1).claims / "step_00000003-test.2.json"
    write_json(newer, {"host": "node7", "pid": 12, "machine": "another", "born": 1, "count": 5})
    one.do(task)
    assert not run.stage(1).scores.exists()
    assert [path.name for path in run.stage(1).claims.glob("*.2.json")] == [newer.name]


def test_what_was_scored_between_the_look_and_the_claim_is_not_scored_again(
    debug_run: Path, tmp_path: Path, hurry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    slow, quick = a_worker(run, "test"), a_worker(run, "test")
    take = slow._parts[0].claims.take

    def take_late(name: str) -> Any:
        quick.do(task_of(quick))
        return take(name)

    monkeypatch.setattr(slow._parts[0].claims, "take", take_late)
    before = slow.turn()
    assert before is None and full(run) == {(3, "test")} and nothing_is_left(run)


@pytest.mark.parametrize("last", ["meta.json", "model.safetensors"])
def test_a_checkpoint_that_is_copied_file_by_file_is_scored_when_it_is_whole(
    debug_run: Path, tmp_path: Path, hurry: None, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    whole = checkpoint.folder_of(run.stage(1).checkpoints, 3)
    copy = checkpoint.folder_of(run.stage(1).checkpoints, 4)
    copy.mkdir()
    monkeypatch.setattr(held, "SETTLE_S", 60)
    one = a_worker(run, "test")
    one.do(task_of(one))
    one.do(task_of(one))
    for path in sorted(whole.iterdir(), key=lambda path: path.name == last):
        content = path.read_bytes()
        if path.name == "meta.json":
            content = content.replace(b'"step": 3', b'"step": 4')
        for part in (content[: len(content) // 2], content):
            assert full(run) == {(3, "test")}
            (copy / path.name).write_bytes(part)
            turn = one.turn()
            if isinstance(turn, Task):
                one.do(turn)
            assert path.name == last or one.turn() is None, "nothing is read again as long as nothing changes"
    assert full(run) == {(3, "test"), (4, "test")}
    assert not list(run.stage(1).scores.glob("*damaged*"))


def test_a_damaged_checkpoint_is_recorded_and_the_others_are_scored(
    debug_run: Path, tmp_path: Path, hurry: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3, 4, 5])
    damage(run, 4)
    assert main(["watch", str(run.path), "--until-finished", "--set", "test"]) == 0
    assert full(run) == {(3, "test"), (5, "test")} and nothing_is_left(run)
    record = read_json(run.stage(1).scores / "step_00000004-damaged.json")
    assert record["step"] == 4 and "altered since it was written" in record["why"]
    assert capsys.readouterr().out.count("stage1: step 4 is damaged") == 1
    assert {score["step"] for score in run.stage(1).read_scores()} == {3, 5}, "a record is no score"

    monkeypatch.setattr(checkpoint, "load", None)
    assert main(["watch", str(run.path), "--until-finished", "--set", "test"]) == 0, "it is not tried again"


def test_a_checkpoint_that_the_training_deletes_while_it_is_scored_is_scored(
    debug_run: Path, tmp_path: Path, hurry: None
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3, 4])
    one = a_worker(run, "test")
    task = task_of(one)
    checkpoint.prune(run.stage(1).checkpoints, keep_last=1, keep=[])
    assert checkpoint.steps(run.stage(1).checkpoints) == [4]
    one.do(task)
    assert full(run) == {(3, "test")} and nothing_is_left(run)


def test_a_checkpoint_that_is_deleted_before_it_is_read_is_said_and_left_out(
    debug_run: Path, tmp_path: Path, hurry: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3, 4])

    def hold_late(*arguments: Any) -> Any:
        checkpoint.prune(run.stage(1).checkpoints, keep_last=1, keep=[])
        return held.hold(*arguments)

    monkeypatch.setattr(worker, "hold", hold_late)
    assert a_worker(run, "test").run_to_its_end() == 0
    assert "stage1: step 3 was deleted before it was scored on test" in capsys.readouterr().out
    assert full(run) == {(4, "test")} and nothing_is_left(run)


def test_predictions_that_are_not_numbers_are_scored_as_such_once(debug_run: Path, tmp_path: Path, hurry: None) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3, 4])
    checkpoints = run.stage(1).checkpoints
    found = checkpoint.load(checkpoint.folder_of(checkpoints, 4))
    spoilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in found.model.items()}
    checkpoint.save(checkpoints, 4, Checkpoint(spoilt, found.moments, found.meta))
    assert a_worker(run, "test").run_to_its_end() == 0
    scores = {score["step"]: score["pearson_r"] for score in run.stage(1).read_scores()}
    assert scores[4] is None and scores[3] is not None
    assert not list(run.stage(1).scores.glob("*damaged*"))


def test_a_set_with_one_run_is_scored_and_an_unknown_set_is_refused(
    debug_run: Path, tmp_path: Path, hurry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    config = yaml.safe_load(run.stage(1).config.read_text())
    config["datasets"]["one"] = {"filter": {"films": ["life"], "repeats": [1]}}
    run.stage(1).config.write_text(yaml.safe_dump(config, sort_keys=False))
    assert a_worker(run, "one").run_to_its_end() == 0
    assert full(run) == {(3, "one")}
    assert main(["watch", str(run.path), "--set", "tset"]) == 2
    assert "found tset, expected one of train, val, test, one" in capsys.readouterr().err


def test_a_set_without_bold_is_refused_with_what_it_is_good_for(
    debug_run: Path, tmp_path: Path, hurry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    config = yaml.safe_load(run.stage(1).config.read_text())
    config["datasets"]["s7"] = {"filter": {"seasons": [7]}}
    run.stage(1).config.write_text(yaml.safe_dump(config, sort_keys=False))
    for command in ("watch", "evaluate"):
        assert main([command, str(run.path), "--set", "s7"]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: --set: no run of this set has BOLD: only `predict --set s7` has a use for it")
        assert line.count("\n") == 1 and line.endswith("found s7, expected one of train, val, test\n")


def test_any_number_of_processes_gives_the_scores_of_one(debug_run: Path, tmp_path: Path, hurry: None) -> None:
    alone = make_crowd(debug_run, tmp_path / "alone", [3, 4, 5])
    damage(alone, 4)
    together = RunDirectory(tmp_path / "together")
    shutil.copytree(alone.path, together.path)
    assert a_worker(alone).run_to_its_end() == 0

    def work(rank: ThreadRank) -> int:
        return a_worker(together, ranks=rank).run_to_its_end()

    assert on_ranks(3, work) == [0, 0, 0]
    damaged = "step_00000004-damaged.json"
    expected, found = files(alone), files(together)
    assert found.keys() == expected.keys() and damaged in found
    assert {name: found[name] for name in found if name != damaged} == {
        name: expected[name] for name in expected if name != damaged
    }


def test_what_the_training_scored_is_added_to_and_still_chooses(debug_run: Path, tmp_path: Path, hurry: None) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(debug_run, run.path)
    before = {number: list(run.stage(number).read_scores()) for number in (1, 2)}
    assert not any(score.get("full") for number in (1, 2) for score in before[number])
    assert a_worker(run).run_to_its_end() == 0
    for number in (1, 2):
        stage = run.stage(number)
        after = {(s["step"], s["set"], s["estimate"]): s for s in stage.read_scores()}
        assert checkpoint.best_step(after.values(), "val") == checkpoint.best_step(before[number], "val")
        there = checkpoint.steps(stage.checkpoints)
        for score in before[number]:
            now = after[score["step"], score["set"], score["estimate"]]
            assert {key: now[key] for key in score} == score
            assert now.get("full", False) == (score["step"] in there)
        estimates = ["mean", "sample"][:number]
        wanted = {(step, name, estimate) for step in there for name in ("val", "test") for estimate in estimates}
        assert wanted <= after.keys()


def test_what_the_training_is_about_to_validate_is_left_to_it(debug_run: Path, tmp_path: Path, hurry: None) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    (run.stage(1).path / "finished.json").unlink()
    one = a_worker(run, "val")
    assert one.turn() is None, "the training may live, and validate it"
    source = checkpoint.folder_of(run.stage(1).checkpoints, 3)
    add_checkpoint(source, run.stage(1).checkpoints, 4)
    assert task_of(one).unit.step == 3, "it has gone on without"


def test_a_poll_reads_nothing_when_nothing_is_new(
    crowd: RunDirectory, hurry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "LOOK_EVERY_S", 60)  # heartbeats are read as rarely as they are written
    one = a_worker(crowd, "test", until_finished=False)
    for step in range(1, 31):
        write_json(crowd.stage(1).scores / f"step_{step:08d}-test-mean.json", {"step": step, "full": True})
    assert one.turn() is None
    opened: list[object] = []
    monkeypatch.setattr(todo, "_is_full", opened.append)
    monkeypatch.setattr(Path, "read_text", opened.append)
    monkeypatch.setattr(Path, "open", opened.append)
    assert [one.turn() for _ in range(3)] == [None] * 3
    assert opened == []


def test_a_score_that_the_training_wrote_over_a_full_one_is_seen_at_its_end(
    debug_run: Path, tmp_path: Path, hurry: None
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3, 4])
    finished = run.stage(1).path / "finished.json"
    finished.rename(tmp_path / "aside")
    one = a_worker(run, "test", until_finished=False)
    one.do(task_of(one))
    one.do(task_of(one))
    assert one.turn() is None
    write_json(run.stage(1).scores / "step_00000003-test-mean.json", {"step": 3, "set": "test", "estimate": "mean"})
    (tmp_path / "aside").rename(finished)
    assert task_of(one).unit.step == 3


def test_a_training_that_is_gone_ends_a_worker_with_a_status_of_its_own(
    debug_run: Path, tmp_path: Path, hurry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    (run.stage(1).path / "finished.json").unlink()
    assert main(["watch", str(run.path), "--until-finished"]) == 3
    assert full(run) == {(3, "val"), (3, "test")}, "what it left is scored first"
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert "no training has begun there within 2 s" in capsys.readouterr().err


def test_a_worker_of_one_stage_leaves_the_other_alone_and_ends_with_its_own(
    debug_run: Path, tmp_path: Path, hurry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    command = ["watch", str(run.path), "--set", "test", "--until-finished", "--stage"]
    assert main([*command, "2"]) == 2
    assert "stage2: no training has begun there within 2 s" in capsys.readouterr().err
    shutil.copytree(debug_run / "stage2", run.stage(2).path)
    (run.stage(2).path / "finished.json").unlink()
    scores = sorted(path.name for path in run.stage(2).scores.iterdir())
    assert main([*command, "1"]) == 0, "though stage 2 has begun, and is gone"
    assert full(run) == {(3, "test")}
    assert sorted(path.name for path in run.stage(2).scores.iterdir()) == scores
    (run.stage(1).path / "finished.json").unlink()
    shutil.rmtree(run.stage(1).scores)
    write_json(run.stage(2).path / "finished.json", {"step": 3})
    assert main([*command, "2"]) == 0, "though stage 1 is gone"
    assert not run.stage(1).scores.exists()
    assert {score["set"] for score in run.stage(2).read_scores() if score.get("full")} == {"test"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_worker_that_releases_its_claims(
    crowd: RunDirectory, start: Start, number: signal.Signals
) -> None:
    process = start("watch", crowd.path)
    until(lambda: len(full(crowd)) >= 2)
    process.send_signal(number)
    assert process.wait(WAIT_S) == 128 + number
    assert nothing_is_left(crowd) and len(full(crowd)) < 60


def test_a_wish_to_stop_ends_the_scoring_between_two_runs(debug_run: Path, tmp_path: Path, hurry: None) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    one = a_worker(run)
    task = task_of(one)
    one._stop._note(signal.SIGTERM, None)
    one.do(task)
    assert not run.stage(1).scores.exists() and nothing_is_left(run)
    assert one.run_to_its_end() == 128 + signal.SIGTERM


def test_what_was_kept_of_a_deleted_checkpoint_is_removed_and_what_others_score_is_not(
    debug_run: Path, tmp_path: Path, hurry: None
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3])
    folder = run.stage(1).scores / "partial"
    for unit in ("step_00000002-test", "step_00000001-test", "step_00000003-val"):
        (folder / f"{unit}-0123").mkdir(parents=True)
    one = a_worker(run, "test")
    with one._parts[0].claims.take("step_00000001-test") or pytest.fail("nobody has it"):
        assert one.run_to_its_end() == 0
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001-test-0123", "step_00000003-val-0123"]


def test_evaluate_scores_what_it_is_asked_to_and_records_the_damaged_of_all(
    debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_crowd(debug_run, tmp_path / "run", [3, 4])
    damage(run, 4)
    assert main(["evaluate", str(run.path), "--step", "all"]) == 0
    record = run.stage(1).scores / "step_00000004-damaged.json"
    assert full(run) == {(3, "val"), (3, "test")} and record.exists()
    assert main(["evaluate", str(run.path), "--step", "4"]) == 2
    assert "altered since it was written" in capsys.readouterr().err
    damage(run, 4)  # the same bit turned twice
    assert main(["evaluate", str(run.path), "--step", "4", "--set", "test"]) == 0
    assert (4, "test") in full(run) and not record.exists()


@pytest.mark.slow
def test_watch_beside_a_live_training_gives_the_scores_of_evaluate_afterwards(
    tiny_shards: Path, debug_config: Path, tmp_path: Path, start: Start
) -> None:
    live, after = RunDirectory(tmp_path / "live"), RunDirectory(tmp_path / "after")
    watching = start("watch", live.path, "--until-finished", world=2, patience=60)  # before there is anything
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu2.yaml")]
    arguments = ["-m", "trainer", "train", "--config", str(debug_config), "--run", str(live.path)]
    options = [f"data.shards={tiny_shards}", "checkpoint.keep_last=9", "stage1.epochs=4"]
    options += ["evaluate.bootstrap=20", "evaluate.samples=2"]
    command = [sys.executable, *launcher, *arguments, *options]
    training = subprocess.run(command, env=ENVIRONMENT, timeout=WAIT_S, capture_output=True, text=True)
    assert training.returncode == 0, training.stderr
    assert watching.wait(WAIT_S) == 0, (tmp_path / "said0").read_text()
    shutil.copytree(live.path, after.path)
    for number in (1, 2):
        for path in after.stage(number).scores.iterdir():  # all but what tells which steps the training validated
            if not path.name.endswith("-val-mean.json") or not read_json(path)["validation"]:
                path.unlink()
    assert main(["evaluate", str(after.path), "--step", "all"]) == 0
    for number in (1, 2):
        of_watch = {path.name: path.read_bytes() for path in live.stage(number).scores.iterdir()}
        there = {f"step_{step:08d}" for step in checkpoint.steps(live.stage(number).checkpoints)}
        of_evaluate = {path.name: path.read_bytes() for path in after.stage(number).scores.iterdir()}
        names = {name for name in of_evaluate if name[:13] in there}
        assert len(names) >= 8 * number
        assert {name: of_watch[name] for name in names} == {name: of_evaluate[name] for name in names}


@pytest.mark.parametrize("below", ["", "run"])
def test_no_training_is_waited_for_where_a_file_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    (tmp_path / "file").touch()
    assert main(["watch", str(tmp_path / "file" / below)]) == 2
    assert f"{tmp_path / 'file'}: is no folder" in capsys.readouterr().err
