"""What runs in each task of a job: the command line, and a record of how it ended.

    python -m trainer.cluster.task --run RUN --name stage1 -- train --config C --run RUN --stage 1 --resume

submitit calls a pickled `Task`. Both come to `trainer.cli.main(argv)` in this process, whose signal handlers are
installed after ours and submitit's. A task that a signal interrupted leaves with status 0: srun, which ends all when
one fails, lets the others save. What is to become of the job is then the batch script's to say (see `ending`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.cluster.ending import EX_LOST, WISHES
from trainer.cluster.records import Diary, Place, folder_of
from trainer.errors import InputError
from trainer.run.directory import RunDirectory
from trainer.run.files import read_json, write_json
from trainer.run.heartbeat import sign_of_life

EARLY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
OF_OTHERS = ("gloo", "nccl", "closed by peer", "reset by peer", "broken pipe", "waited for the other ranks", "tcpstore")
"""What the errors of torch.distributed say where another rank is gone."""
QUOTED = "the main process failed"
"""So begins what `Processes.first` raises on the other ranks."""
GONE = 3
"""`watch` says so where the training is gone: its job may come back."""
LOOK_EVERY_S = 15.0
TURN = "FMRI_FLOW_TURN"


class Task:
    """One task, as submitit pickles it: by reference to this class, which PYTHONPATH finds.

    Args:
        argv: of the command line.
        run: run directory.
        name: of the job: stage1, evaluate2, shards, ...
        environment: what to set before anything is started, e.g. MASTER_ADDR and MASTER_PORT.
    """

    def __init__(
        self, argv: Sequence[str], *, run: str, name: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.argv, self.run, self.name = list(argv), str(run), name
        self.environment = dict(environment or {})

    def __call__(self) -> int:
        """Run it. Raises SystemExit unless the status is 0, so that submitit writes no result that is none."""
        status = self.work()
        if status:
            raise SystemExit(0 if status in WISHES else status)
        return 0

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """What submitit should run where a signal comes before our handlers are in place: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def work(self) -> int:
        """Run it; returns its status, which is also in its record."""
        os.environ.update(self.environment)
        os.environ.update(announced(os.environ))
        place = Place.of_task(os.environ)
        diary = Diary(Path(self.run), place)
        diary.begin()
        with _leaving_on_signals(diary):
            command = self._command(place, diary)
            status, why = _guarded(command, tasks=place.tasks if place else 1)
            diary.end(status, why)
        return status

    def _command(self, place: Place | None, diary: Diary) -> Callable[[], int]:
        if self.name == "shards":
            return lambda: _make_shards(self.argv, diary.end)
        if self.argv[:1] == ["sweep"]:
            from trainer.cluster import sweep

            return lambda: sweep.main(self.argv[1:])
        if self.name.startswith("evaluate") and place is not None and "SLURM_JOB_ID" in os.environ:
            follower = Follower(Path(self.run), int(self.name.removeprefix("evaluate")), place)
            return lambda: follower.follow(lambda: _call(self.argv))
        return lambda: _call(self.argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a task from the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.cluster.task", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--name", required=True, help="of the job: stage1, stage2, evaluate1, ..., shards, report")
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- ARGV", help="of `python -m trainer`")
    options = parser.parse_args(argv)
    status = Task(options.argv[options.argv[:1] == ["--"] :], run=options.run, name=options.name).work()
    return 0 if status in WISHES else status


def announced(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch has to be told of a world that submitit started on this machine: of several processes, or sharded."""
    tasks = int(environment.get("SUBMITIT_LOCAL_NTASKS", 1))
    sharded = environment.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if environment.get("SUBMITIT_EXECUTOR") != "local" or (tasks == 1 and not sharded):
        return {}
    rank = environment["SUBMITIT_LOCAL_GLOBALID"]
    local = environment.get("SUBMITIT_LOCAL_LOCALID", rank)
    return {"RANK": rank, "WORLD_SIZE": str(tasks), "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": str(tasks)}


def _call(argv: Sequence[str]) -> int:
    from trainer.cli import main as command

    return command(argv)


def _make_shards(argv: Sequence[str], before_abort: Callable[[int], None]) -> int:
    """The tool beside the package, which is not installed with it."""
    import trainer

    root = Path(trainer.__file__).resolve().parents[1]
    if not (root / "tools" / "make_shards.py").exists():
        raise InputError(root / "tools" / "make_shards.py", "missing", fix="Run from a checkout, or without --shards.")
    sys.path.insert(0, str(root))
    from tools.make_shards import main as make_shards

    return make_shards(argv, before_abort)


def _guarded(command: Callable[[], int], tasks: int) -> tuple[int, str]:
    """The status of a command, and what to say of it, whichever way it ends."""
    try:
        return command(), ""
    except SystemExit as left:  # argparse
        return left.code if isinstance(left.code, int) else int(left.code is not None), ""
    except InputError as error:  # before the command line, which catches its own
        print(f"error: {error}", file=sys.stderr)
        return 2, str(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "Ctrl-C"
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return (EX_LOST if tasks > 1 and lost_the_others(error) else 1), text


def lost_the_others(error: BaseException | None) -> bool:
    """Whether an error of one of several ranks says that another one is gone: that one is the cause."""
    while error is not None:
        text = str(error).lower()
        if type(error).__module__.startswith("torch.distributed") or isinstance(error, ConnectionError):
            return True  # its DistError, and what is of no other kind than the connections to other ranks
        if isinstance(error, RuntimeError | TimeoutError) and (
            any(words in text for words in OF_OTHERS) or text.startswith(QUOTED)
        ):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def _leaving_on_signals(diary: Diary) -> Iterator[None]:
    """A signal before the trainer's own handlers are there, or after they are gone, ends it at once, on record."""

    def leave(number: int, _: FrameType | None) -> None:
        diary.end(128 + number, f"{signal.Signals(number).name} while nothing was trained", idle=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    before = {number: signal.signal(number, leave) for number in EARLY}
    try:
        yield
    finally:
        for number in EARLY:
            signal.signal(number, signal.SIG_IGN)  # the record stands
        if os.environ.get("SUBMITIT_EXECUTOR") == "debug":  # the process of who submitted
            for number, handler in before.items():
                signal.signal(number, handler)


class Follower:
    """A worker that outlives the jobs of its stage: these may be requeued, or followed by the next link.

    Where the worker is several tasks, the first one asks and the others read what it found. Each `watch` has a process
    of its own, in the place of the one before.
    """

    def __init__(self, run: Path, stage: int, place: Place, alive: Callable[[], bool] | None = None) -> None:
        self._run, self._stage, self._place = run, stage, place
        self._directory = RunDirectory(run).stage(stage)
        self._alive = alive or self._ask_the_queue
        self._turn = int(os.environ.get(TURN, 0))
        self._environment = dict(os.environ)

    def follow(self, watch: Callable[[], int]) -> int:
        """Wait for the stage to begin, watch it, and again when its job is back; returns the last status."""
        if not self._decide(self._begins):
            print(f"stage {self._stage} of {self._run} has never begun, and its jobs are over: nothing to score")
            return 0
        status = watch()
        if status == GONE and self._decide(self._comes_back):
            print(f"stage {self._stage}: its training is back: watching on", flush=True)
            self._watch_anew()
        return status

    def _begins(self) -> bool:
        """Wait until the stage has begun; False where its jobs are over without that."""
        return self._wait_for(self._directory.config.exists)

    def _comes_back(self) -> bool:
        """Wait for a sign of life of the training that is gone; False where its jobs are over without that."""
        last = sign_of_life(self._directory.path)
        return self._wait_for(lambda: sign_of_life(self._directory.path) != last or self._is_finished())

    def _is_finished(self) -> bool:
        return self._directory.finished() is not None

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until something holds, as long as the queue holds who may bring it about."""
        while not condition():
            if not self._alive():
                return condition()
            time.sleep(LOOK_EVERY_S)
        return True

    def _decide(self, question: Callable[[], bool]) -> bool:
        """The answer of the first task, for all tasks."""
        self._turn += 1
        if self._place.tasks == 1:
            return question()
        folder = folder_of(self._run, self._place.job) / "turns"
        path = folder / f"{self._place.restart}.{self._turn}.json"
        if self._place.rank == 0:
            write_json(path, {"yes": question()})
        while not path.exists():
            time.sleep(1.0)
        return bool(read_json(path)["yes"])

    def _watch_anew(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number in EARLY:  # until the new process has handlers
            signal.signal(number, signal.SIG_IGN)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**self._environment, TURN: str(self._turn)})

    def _ask_the_queue(self) -> bool:
        from trainer.run import jobs

        return jobs.alive(self._run, self._stage)


if __name__ == "__main__":
    import faulthandler

    faulthandler.enable()  # a disk that fails under a mapped shard is a SIGBUS: say where
    sys.exit(main())
