"""A task of a job: its record at every end, signals outside of the training, and who is at fault when one is lost."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import trainer.cli
from trainer.cluster import task
from trainer.cluster.ending import EX_LOST
from trainer.cluster.records import Place
from trainer.cluster.task import Follower, Task, announced, lost_the_others, main
from trainer.errors import InputError
from trainer.run.files import write_json

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 120
SLURM = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_RESTART_COUNT": "3"}


@pytest.fixture(autouse=True)
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Task 1 of 2 of the fourth start of job 12, whose signals stay as they are."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_", "FMRI_FLOW_TURN"))]:
        monkeypatch.delenv(name)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)


def record(run: Path, name: str = "3.1") -> Mapping[str, Any]:
    return dict(json.loads((run / "slurm" / "12" / "tasks" / f"{name}.json").read_text()))


def calls(monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], int]) -> None:
    monkeypatch.setattr(trainer.cli, "main", command)


def raises(error: BaseException) -> Callable[[list[str]], int]:
    def command(argv: list[str]) -> int:
        raise error

    return command


CLOSED = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"
)
USR2 = 128 + signal.SIGUSR2


@pytest.mark.parametrize(
    ("command", "recorded", "left"),
    [
        (lambda argv: 0, 0, 0),
        (lambda argv: USR2, USR2, 0),
        (lambda argv: 3, 3, 3),
        (lambda argv: 128 + signal.SIGINT, 130, 130),
        (raises(ValueError("ours")), 1, 1),
        (raises(InputError("a key", "is wrong")), 2, 2),
        (raises(SystemExit(2)), 2, 2),
        (raises(CLOSED), EX_LOST, EX_LOST),
    ],
)
def test_every_end_is_on_record_and_an_interrupted_task_leaves_without_a_fuss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], int], recorded: int, left: int
) -> None:
    calls(monkeypatch, command)
    assert main(["--run", str(tmp_path), "--name", "stage1", "--", "train", "--resume"]) == left
    said = record(tmp_path)
    assert (said["rank"], said["tasks"], said["status"], said["pid"]) == (1, 2, recorded, os.getpid())
    assert said["ended"] >= said["began"]


def test_a_build_of_shards_that_mpi_ends_is_on_record_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import make_shards

    def build(argv: list[str], before_abort: Callable[[int], None]) -> int:
        assert argv == ["--out", "shards"]
        before_abort(2)
        assert record(tmp_path)["status"] == 2
        return 2

    monkeypatch.setattr(make_shards, "main", build)
    assert main(["--run", str(tmp_path), "--name", "shards", "--", "--out", "shards"]) == 2


def test_it_is_on_record_before_it_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: list[str]) -> int:
        assert argv == ["train", "--resume"] and record(tmp_path)["status"] is None
        return 0

    calls(monkeypatch, command)
    assert main(["--run", str(tmp_path), "--name", "stage1", "--", "train", "--resume"]) == 0


def test_a_single_process_that_loses_a_connection_has_nobody_else_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    calls(monkeypatch, raises(ConnectionResetError("by a tracker")))
    assert main(["--run", str(tmp_path), "--name", "stage1", "--", "train"]) == 1


def test_submitit_gets_a_result_from_a_task_that_is_done_and_from_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Task(["train"], run=str(tmp_path), name="stage1", environment={"MASTER_ADDR": "n1"})
    again = pickle.loads(pickle.dumps(made))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    calls(monkeypatch, lambda argv: 0 if os.environ["MASTER_ADDR"] == "n1" and argv == ["train"] else 1)
    assert again() == 0
    for status, left in ((USR2, 0), (1, 1), (EX_LOST, EX_LOST)):
        calls(monkeypatch, lambda argv, status=status: status)  # type: ignore[misc]
        with pytest.raises(SystemExit) as exit:
            again()
        assert exit.value.code == left
    delayed = made.checkpoint()
    assert delayed.function is made and not delayed.args


def test_tasks_that_submitit_starts_here_are_announced_as_torch_reads_it() -> None:
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "77", "SUBMITIT_LOCAL_GLOBALID": "1"}
    local |= {"SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
    assert announced(local) == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert announced(local | {"SUBMITIT_LOCAL_NTASKS": "1"}) == {}
    assert announced(SLURM) == announced({}) == {}
    assert Place.of_task(local | SLURM) == Place("77", 0, 1, 2), "also inside an allocation"
    assert Place.of_task({**SLURM, "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}) == Place("10_2", 3, 1, 2)
    assert Place.of_task({}) is None


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (CLOSED, True),
        (ConnectionResetError("reset"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (TimeoutError("rank 0 of 2 on n1 waited for the other ranks for longer than timeout_s=600"), True),
        (RuntimeError("the main process failed: ValueError('of main')"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:119] Timed out waiting 1800ms for recv"), True),
        (ValueError("gloomy"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (FileNotFoundError("a shard"), False),
        (FloatingPointError("loss is not a number"), False),
    ],
)
def test_who_is_at_fault_when_a_rank_fails(error: Exception, lost: bool) -> None:
    assert lost_the_others(error) == lost


def test_an_error_that_came_of_a_lost_rank_is_no_other() -> None:
    try:
        raise KeyError("of a step") from CLOSED
    except KeyError as error:
        assert lost_the_others(error)


# Real processes.

LOSE = """
import sys
sys.argv[1:] = ["--run", sys.argv[1], "--name", "stage1", "--"]
import trainer.cli
from trainer.cluster import task
from trainer.run.processes import Boundary, make_processes

def train(argv):
    processes = make_processes(precision="no", deterministic=False, timeout_s=60)
    boundary = Boundary(processes)
    for step in range(10**6):
        boundary.begin(0, False)
        boundary.agreed()
        print(step, flush=True)

trainer.cli.main = train
sys.exit(task.main())
"""


def start(code: str, run: Path, **settings: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "ACCELERATE_", "PMI_"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen([sys.executable, "-c", code, str(run)], env=environment, stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
def test_the_rank_that_is_left_when_another_is_killed_says_that_it_lost_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    step = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": port}
    ranks = [start(LOSE, tmp_path, **step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "0\n"
        ranks[1].kill()
        _, said = ranks[0].communicate(timeout=WAIT_SECONDS)
        assert ranks[0].returncode == EX_LOST, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert record(tmp_path, "0.0")["status"] == EX_LOST
    assert record(tmp_path, "0.1")["status"] is None


WAIT = """
import sys, time
sys.argv[1:] = ["--run", sys.argv[1], "--name", "stage1", "--"]
import trainer.cli
from trainer.cluster import task
def train(argv):
    print("here", flush=True)
    time.sleep(600)
trainer.cli.main = train
sys.exit(task.main())
"""


def test_a_signal_while_nothing_is_trained_ends_a_task_on_record(tmp_path: Path) -> None:
    waiting = start(WAIT, tmp_path, SLURM_JOB_ID="12")
    try:
        assert waiting.stdout is not None and waiting.stdout.readline() == "here\n"
        waiting.send_signal(signal.SIGUSR2)
        _, said = waiting.communicate(timeout=WAIT_SECONDS)
    finally:
        waiting.kill()
    assert waiting.returncode == 0, said
    assert record(tmp_path, "0.0")["status"] == USR2


# Workers.


class Anew(Exception):
    """Instead of a new process."""


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A worker of stage 2 that finds jobs alive as `alive` says, look by look, and watches with `status`."""
    monkeypatch.setattr(task, "LOOK_EVERY_S", 0.0)

    def anew(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert arguments[1:] == sys.orig_argv[1:] and environment[task.TURN] == "2"
        raise Anew

    monkeypatch.setattr(os, "execve", anew)

    def follow(alive: list[Callable[[], bool]], status: int) -> int:
        return Follower(tmp_path, 2, Place("12"), lambda: alive.pop(0)()).follow(lambda: status)

    return follow


def begin(run: Path) -> bool:
    (run / "stage2").mkdir(parents=True, exist_ok=True)
    (run / "stage2" / "config.yaml").write_text("")
    return True


def test_a_worker_waits_for_its_stage_as_long_as_its_jobs_are_alive(
    tmp_path: Path, follow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow([lambda: True, lambda: True, lambda: begin(tmp_path)], 0) == 0
    assert capsys.readouterr().out == ""
    assert follow([], 2) == 2, "its own error is its own"


def test_a_worker_of_a_stage_that_never_was_ends_well(
    follow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow([lambda: True, lambda: False], 1) == 0
    assert "has never begun, and its jobs are over: nothing to score" in capsys.readouterr().out


def test_a_worker_watches_anew_when_the_training_is_back(tmp_path: Path, follow: Callable[..., int]) -> None:
    begin(tmp_path)
    start = {"host": "n1", "pid": 1, "machine": "another", "born": 1}

    def restart() -> bool:
        write_json(tmp_path / "stage2" / "starts" / "2.json", start)
        return True

    with pytest.raises(Anew):
        follow([lambda: True, restart], task.GONE)
    assert follow([lambda: True, lambda: False], task.GONE) == task.GONE, "nobody will be back"
    write_json(tmp_path / "stage2" / "finished.json", {"step": 1})
    with pytest.raises(Anew):
        follow([], task.GONE)


def test_the_first_of_several_workers_asks_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> bool:
        asked.append(1)
        return False

    asked: list[int] = []
    first, second = (Follower(tmp_path, 2, Place("12", 0, rank, 2), ask) for rank in (0, 1))
    assert first.follow(lambda: 1) == 0 and len(asked) == 1
    assert second.follow(lambda: 1) == 0 and len(asked) == 1
