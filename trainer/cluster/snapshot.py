"""A copy of the code in the run directory, from which the jobs of the run are run.

    RUN/code/    trainer/  slurm/  tools/  snapshot.json {"git_commit", "git_diff", "sha256"}

Jobs wait for hours, and are requeued for days; whoever goes on working in the checkout meanwhile would change what they
run. The copy is taken once. When a run is submitted again with other code, the copy is replaced only where nothing of
the run is running or waiting in the queue: a job that waits was submitted with the code that lies there, and one that
is requeued would go on with half of its training done by the one, half by the other. Each start keeps what it ran.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from trainer.errors import InputError
from trainer.run import heartbeat, jobs
from trainer.run.code import ROOT, SNAPSHOT, Code, code, files, sha256
from trainer.run.directory import RunDirectory
from trainer.run.jobs import Run


def take(run: Path, *, root: Path = ROOT, ask: Run = subprocess.run) -> Path:
    """Copy the code into RUN/code, unless it lies there already; returns that folder.

    Raises:
        InputError: other code lies there and something of the run runs, or waits in the queue; it cannot be written.
    """
    target = run / "code"
    if target.exists() and target.resolve() == root.resolve():
        return target
    now = code(root)
    if (target / SNAPSHOT).exists():
        if sha256(target) == now.sha256:
            return target
        _refuse_while_it_runs(run, target, ask)
    elif target.exists():
        raise InputError(target, "is no copy of the code", fix="Delete it, or choose another --run.")
    try:
        _replace(target, now, root)
    except OSError as error:
        raise InputError(target, f"cannot be written: {error.strerror}", fix="Choose another --run.") from error
    return target


def _refuse_while_it_runs(run: Path, target: Path, ask: Run) -> None:
    ids, trouble = jobs.in_queue(run, ask=ask)
    trained = [n for n in (1, 2) if heartbeat.holder(RunDirectory(run).stage(n).path) is not None]
    whos = [*([f"jobs {', '.join(ids)}"] if ids else []), *(f"a training of stage {n}" for n in trained)]
    if whos or trouble:
        cancel = f" (`scancel {' '.join(ids)}`)" if ids else ""
        raise InputError(
            target,
            "holds other code, with which the run is under way" if whos else "holds other code, and the run may use it",
            found=" and ".join(whos) or trouble,
            fix=f"Wait for the end{cancel}, or choose another --run.",
        )


def _replace(target: Path, now: Code, root: Path) -> None:
    """Let the copy appear whole, in the place of an older one."""
    aside, old = target.with_name(f".code.new.{os.getpid()}"), target.with_name(f".code.old.{os.getpid()}")
    try:
        for path in files(root):
            copied = aside / path.relative_to(root)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)  # readable by whom the run is, whoever may read the checkout
        now.write(aside)
        if target.exists():
            target.rename(old)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
