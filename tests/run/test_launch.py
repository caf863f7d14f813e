"""Real launches of two processes: one world, one mind at step boundaries, one end. Each start costs seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 180
"""A bound for what takes seconds, on a machine that may be busy."""
TIMEOUT_S = 12
"""The timeout of the watchdogs; longer than a busy machine lets a small step wait."""

RANK = """
import json, multiprocessing, os, signal, sys, time
import torch
import trainer.run.processes
from trainer.errors import InputError, exit_on_input_error
from trainer.run.processes import Boundary, StopRequest, make_processes
from trainer.run.watchdog import Watchdog

what, timeout_s = sys.argv[1], float(sys.argv[2])

def tell(**facts):
    # in one write: print makes two of an unbuffered line, and the other rank's may come between them
    sys.stdout.write(json.dumps({"rank": processes.rank, "pid": os.getpid(), **facts}) + "\\n")
    sys.stdout.flush()

def fail(error):
    raise error

def agree():
    boundary, agreed = Boundary(processes), []
    with StopRequest() as stop:
        for turn in range(4):
            if turn == 1 and processes.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            boundary.begin(stop.signum, save=turn == 2 and processes.rank == 0)
            agreed.append(boundary.agreed())
    try:
        processes.first(lambda: fail(ValueError("of main")))
    except Exception as error:
        quoted = repr(error)
    tell(
        world=processes.world, launcher=processes.launcher, sharded=processes.sharded, device=str(processes.device),
        deepspeed="deepspeed" in sys.modules, type=processes.accelerator.distributed_type.value,
        sum=processes.sum(torch.tensor([processes.rank + 1.0])).tolist(), dealt=processes.share([0, 1, 2, 3, 4]),
        gathered=processes.gather_objects(f"of {processes.rank}"), from_main=processes.from_main(processes.rank),
        first=processes.first(os.getpid), agreed=agreed, quoted=quoted,
    )
    if processes.launcher == "srun":
        processes.first(lambda: fail(InputError("the study", "has no runs")))

def go_on():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,), daemon=True)
    if what == "hang":
        worker.start()
    tell(worker=worker.pid)
    boundary = Boundary(processes)
    with StopRequest(), Watchdog(processes, timeout_s) as watch:
        for step in range(1, 10**6):
            watch.alive(step)
            if what == "hang" and step == 9 and processes.rank == 1:
                time.sleep(3600)
            boundary.begin(0, False)
            boundary.agreed()
            if step % 5 == 0:
                tell(step=step)
            time.sleep(0.05)

def work_on():
    with StopRequest(), Watchdog(processes, timeout_s) as watch:
        for _ in range(int(1.5 * timeout_s / 0.1) if processes.rank == 0 else 0):
            watch.alive()
            time.sleep(0.1)
        tell(gathered=processes.gather_objects(processes.rank))

@exit_on_input_error
def main():
    global processes
    if what == "work":
        trainer.run.processes.GRACE_SECONDS = -timeout_s / 2  # torch alone would have waited for half as long
    processes = make_processes(precision="no", deterministic=False, timeout_s=timeout_s)
    {"agree": agree, "work": work_on}.get(what, go_on)()
    return 0

if __name__ == "__main__":
    sys.exit(main())
"""


class Started:
    """Processes that were started, what they say, and a sure end of them."""

    def __init__(self, folder: Path, name: str, command: Sequence[str], what: str, **settings: str) -> None:
        script = folder / "rank.py"
        script.write_text(RANK)
        self._said, self._complained = folder / f"{name}.out", folder / f"{name}.err"
        unset = ("SLURM_", "PMI_", "OMPI_", "MV2_", "ACCELERATE_", "MASTER_", "CUDA_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
        with self._said.open("w") as out, self._complained.open("w") as err:
            self.process = subprocess.Popen(
                [*command, str(script), what, str(TIMEOUT_S)], env=environment, stdout=out, stderr=err
            )

    def end(self) -> int:
        """Wait for the end, and see that nothing is left."""
        status = self.process.wait(WAIT_SECONDS)
        until(lambda: not any(map(works, self.pids())))
        return status

    def facts(self) -> list[dict[str, Any]]:
        lines = self._said.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def pids(self) -> set[int]:
        return {pid for fact in self.facts() for pid in (fact["pid"], fact.get("worker")) if pid}

    def errors(self) -> str:
        return self._complained.read_text()

    def output(self) -> str:
        return self._said.read_text()

    def clear(self) -> None:
        for pid in {self.process.pid, *self.pids()}:
            if works(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that end with the test at the latest."""
    started: list[Started] = []

    def start(command: Sequence[str], what: str, **settings: str) -> Started:
        started.append(Started(tmp_path, f"start{len(started)}", command, what, **settings))
        return started[-1]

    yield start
    for each in started:
        each.clear()


def works(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def srun(start: Start, what: str) -> list[Started]:
    """Two tasks, with what srun sets for them on one node."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    return [start([sys.executable], what, **step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def accelerate(config: str) -> list[str]:
    file = ROOT / "configs" / "accelerate" / config
    return python("accelerate.commands.launch", "--config_file", str(file))


def assert_of_one_mind(facts: list[dict[str, Any]], launcher: str, *, sharded: bool = False) -> None:
    """Two ranks say the same of everything that they share."""
    facts = sorted(facts, key=lambda fact: fact["rank"])
    assert [fact["rank"] for fact in facts] == [0, 1] and facts[0]["pid"] != facts[1]["pid"]
    assert [fact["dealt"] for fact in facts] == [[0, 2, 4], [1, 3]]
    assert facts[0]["quoted"] == "ValueError('of main')"
    assert facts[1]["quoted"].startswith("RuntimeError") and "main process failed: ValueError" in facts[1]["quoted"]
    for fact in facts:
        assert (fact["world"], fact["launcher"], fact["device"]) == (2, launcher, "cpu")
        assert (fact["sharded"], fact["deepspeed"]) == (sharded, sharded)
        assert fact["type"] == ("DEEPSPEED" if sharded else "MULTI_CPU")
        assert (fact["sum"], fact["gathered"]) == ([3.0], ["of 0", "of 1"])
        assert (fact["from_main"], fact["first"]) == (0, facts[0]["pid"])
        # rank 1 alone got a signal in turn 1, and rank 0 alone wanted a checkpoint in turn 2
        usr1 = int(signal.SIGUSR1)
        assert fact["agreed"] == [[0, False], [usr1, False], [usr1, True], [usr1, False]]


@pytest.mark.slow
def test_torchrun_is_one_world_and_a_killed_rank_ends_it(start: Start) -> None:
    torchrun = python("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    agreed = start(torchrun, "agree")
    assert agreed.end() == 0, agreed.errors()
    assert_of_one_mind(agreed.facts(), "torchrun")

    killed = start(torchrun, "go on")
    until(lambda: any(fact.get("step", 0) >= 80 for fact in killed.facts()))
    os.kill(next(fact["pid"] for fact in killed.facts() if fact["rank"] == 1), signal.SIGKILL)
    assert killed.end() == 1
    host = socket.gethostname()
    (line,) = [line for line in killed.errors().splitlines() if line.startswith("rank 0 of 2")]
    assert (
        f"rank 0 of 2 on {host}, after step " in line
        and f"Behind: rank 1 on {host} is silent, and last told of step " in line
    )


@pytest.mark.slow
def test_accelerate_is_one_world_with_each_file_for_two_processes_on_a_cpu(start: Start) -> None:
    replicated = start(accelerate("cpu2.yaml"), "agree")
    assert replicated.end() == 0, replicated.errors()
    assert_of_one_mind(replicated.facts(), "accelerate launch")

    sharded = start(accelerate("deepspeed_zero2_cpu.yaml"), "agree")
    assert sharded.end() == 0, sharded.errors()
    assert_of_one_mind(sharded.facts(), "accelerate launch", sharded=True)
    assert "[INFO]" not in sharded.output() + sharded.errors()


@pytest.mark.slow
def test_tasks_of_srun_are_one_world_and_bad_input_ends_both_with_one_line(start: Start) -> None:
    tasks = srun(start, "agree")
    for task in tasks:
        assert task.end() == 2, task.errors()
        assert task.errors() == "error: the study: has no runs\n"
    assert_of_one_mind([fact for task in tasks for fact in task.facts()], "srun")


@pytest.mark.slow
def test_hung_rank_and_the_one_that_waits_for_it_end_with_a_message(start: Start) -> None:
    tasks = srun(start, "hang")
    for rank, task in enumerate(tasks):
        assert task.end() == 1, task.errors()
        assert len(task.pids()) == 2, "the rank and its worker, and neither is left"
        line, *stacks = [line for line in task.errors().splitlines() if line]
        assert line.startswith(
            f"watchdog: rank {rank} of 2 on {socket.gethostname()}, after step 9: no progress for 12 s."
        )
        assert any("in go_on" in stack for stack in stacks)


@pytest.mark.slow
def test_a_rank_waits_for_one_that_works_for_longer_than_the_timeout(start: Start) -> None:
    tasks = srun(start, "work")
    for task in tasks:
        assert task.end() == 0, task.errors()
        assert task.facts()[-1]["gathered"] == [0, 1]


@pytest.mark.slow
def test_stopped_rank_ends_the_one_that_waits_and_then_itself(start: Start) -> None:
    waiting, stopped = srun(start, "go on")
    until(lambda: any(fact.get("step", 0) >= 80 for fact in stopped.facts()))
    os.kill(stopped.process.pid, signal.SIGSTOP)
    host = socket.gethostname()
    assert waiting.end() == 1
    assert f"watchdog: rank 0 of 2 on {host}, after step " in waiting.errors()
    assert f"Behind: rank 1 on {host} is silent, and last told of step " in waiting.errors()
    os.kill(stopped.process.pid, signal.SIGCONT)
    assert stopped.end() == 1
    assert f"rank 1 of 2 on {host}, after step " in stopped.errors()
    assert "rank 0 last told of step " in stopped.errors(), "it took the store with it"


@pytest.mark.slow
def test_what_cannot_become_one_world_is_one_line(start: Start) -> None:
    alone = start(python("accelerate.commands.launch", "--cpu", "--num_processes", "2"), "agree")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        task = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        busy = start([sys.executable], "agree", **task, SLURM_STEP_NODELIST="localhost", MASTER_PORT=port)
        assert busy.end() == 2
    (line,) = busy.errors().splitlines()
    assert line.startswith(f"error: MASTER_PORT: port {port} is in use on localhost") and "Set MASTER_PORT" in line
    assert alone.end() == 1, "accelerate makes 1 of our 2"
    (line,) = [line for line in alone.errors().splitlines() if line.startswith("error: ")]
    assert "found --num_processes 2" in line and "cpu2.yaml" in line and not alone.facts()
