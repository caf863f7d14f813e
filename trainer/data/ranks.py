"""The processes that build shards: this one alone, or all ranks of an MPI program.

    python tools/make_shards.py ...                              one process, MPI is not imported
    mpiexec -n N python -m mpi4py tools/make_shards.py ...       N ranks; the same under `srun --mpi=pmi2` or pmix

Rank 0 leads: it alone reads the command line and the survey, and writes the manifest. The other ranks serve it through
mpi4py.futures, which hands the next task to whoever is free; rank 0 itself takes tasks from the end of the list that
no rank has begun. A rank that fails hands its error to rank 0, which ends all of them: `MPI_Abort` is bounded, where an
orderly end would wait for whatever the others are doing.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from trainer.errors import InputError
from trainer.progress import Tick

Result = TypeVar("Result")

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID")
"""What mpiexec and srun set for the ranks that they start."""
GRACE_SECONDS = 10
"""A rank that is told to end and does not lead leaves the end to rank 0, but not for longer than this."""


class Crew:
    """The processes that a leader can give tasks to, itself included; without an executor it is alone."""

    def __init__(self, executor: Any = None) -> None:
        self._executor = executor

    def run(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], tick: Tick,
        finished: Callable[[int], None],
    ) -> list[Result]:  # fmt: skip
        """`function(*task, tick)` for each task; the results in the order of the tasks.

        Args:
            function: of a module, so that other ranks can import it. It runs with a `tick` that is None elsewhere.
            tick: handed to the tasks of a process that is alone.
            finished: called with the index of each task that one of several processes has done.

        Raises: what a task raised, at once, whatever the other tasks are at.
        """
        if self._executor is None:
            return [function(*task, tick) for task in tasks]
        futures = [self._executor.submit(function, *task, None) for task in tasks]
        arrived: queue.SimpleQueue[tuple[int, Future[Result]]] = queue.SimpleQueue()
        for i, future in enumerate(futures):
            future.add_done_callback(lambda f, i=i: None if f.cancelled() else arrived.put((i, f)))

        def take_my_share() -> None:
            for i in reversed(range(len(tasks))):
                if futures[i].cancel():  # only what no rank has begun can be taken back
                    arrived.put((i, _done(function, *tasks[i], None)))

        # in a thread, so that this one hears of the failure of another rank, or a signal, while a task runs here
        threading.Thread(target=take_my_share, daemon=True).start()
        results: dict[int, Result] = {}
        while len(results) < len(tasks):
            i, future = arrived.get()
            results[i] = future.result()
            finished(i)
        return [results[i] for i in range(len(tasks))]


def _done(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Run a function here; what it returns or raises, as another rank would send it."""
    future: Future[Result] = Future()
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)
    return future


def on_ranks(lead: Callable[[Crew], int], before_abort: Callable[[int], None] | None = None) -> int:
    """Run `lead` on rank 0 with all ranks as its crew, and end them all with the status that it returns or raises.

    Args:
        lead: returns an exit status.
        before_abort: told of a status that is not 0 before MPI ends all ranks with it, this one too.

    Raises InputError where SLURM started several tasks that MPI does not connect.
    """
    world = _world()
    if world is None or world.size == 1:
        return lead(Crew())
    from mpi4py.futures import MPICommExecutor

    if world.rank:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: signal.alarm(GRACE_SECONDS))
    with MPICommExecutor(world, root=0) as executor:
        if executor is None:  # this rank has served, and rank 0 is done
            return 0
        status = _status(lead, Crew(executor))
        if status:
            sys.stdout.flush()
            sys.stderr.flush()
            if before_abort is not None:
                before_abort(status)
            world.Abort(status)
            return status  # under srun it is the node's manager that ends us, a moment later
    return 0


def _status(lead: Callable[[Crew], int], crew: Crew) -> int:
    try:
        return lead(crew)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def _world() -> Any:
    """COMM_WORLD where this process was started as an MPI program, else None. Raises InputError."""
    started = "mpi4py.run" in sys.modules or any(name in os.environ for name in RANK_VARIABLES)
    world = _import_world() if started else None
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1 and (world is None or world.size == 1):
        raise InputError(
            "SLURM_NTASKS",
            "the tasks do not see each other",
            found="an MPI world of 1",
            expected=f"the {tasks} tasks that SLURM announced",
            fix="Start with `srun --mpi=pmi2 python -m mpi4py tools/make_shards.py ...` (or --mpi=pmix: what `srun "
            "--mpi=list` and the MPI library offer), or one process with `srun -n 1`.",
        )
    return world


def _import_world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            "MPI",
            "the library cannot be loaded",
            found=error,
            fix='Load the MPI module of the site, or `pip install mpich`, or start without mpiexec and "-m mpi4py".',
        ) from error
    return MPI.COMM_WORLD
