"""What a submission leaves behind, so that one that SLURM refuses leaves nothing.

A chain of jobs is submitted whole or not at all. Folders, configurations and the list of jobs are written before SLURM
has taken the last job, since the first one may begin at once; where a later one is refused, those before it are
cancelled, and all that was written is deleted. Folders that were there before keep what is not of this submission.
slurm/submit.sh does the same by

    python -m trainer.cluster.traces make RUN                        makes RUN/slurm, prints the folders that it made
    python -m trainer.cluster.traces undo RUN [--made DIR ...] [--jobs ID ...]
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import InputError, exit_on_input_error
from trainer.run import jobs as queue

ASK_S = 20
"""How long scancel may take."""
END_WITHIN_S = 90.0
"""How long a job that had begun may take to end once it is cancelled: SLURM kills it after KillWait, 30 s mostly."""
LOOK_EVERY_S = 0.5


@dataclass
class Traces:
    """What a submission has written and submitted so far.

    Attributes:
        runs: the run directories that it writes in.
        made: the folders that were not there before, outer ones first.
        files: the files, and folders of its own, that it wrote in folders that may have been there.
        ids: of its jobs, and of each element of an array.
    """

    runs: Sequence[Path]
    made: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def make(self, folder: Path) -> None:
        """Make a folder with its parents. Raises InputError where it cannot be made."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError:  # another submission has just made it, and may go on
                continue
            except OSError as error:
                raise InputError(path, f"cannot be made: {error.strerror}", fix="Choose another --run.") from error
            self.made.append(path)

    def undo(self, *, ask: Callable[[Sequence[str]], tuple[tuple[str, ...], str]] = queue.living) -> str:
        """Cancel the jobs, wait for those that had begun, and delete what was written; returns what is left, in words.

        Args:
            ask: which jobs live, and why that is not known: what they write as they end comes before the deletion.
        """
        bases = list(dict.fromkeys(job.partition("_")[0] for job in self.ids))
        cancelled = not bases or _cancel(bases)
        deadline = time.monotonic() + END_WITHIN_S
        while self.ids:
            alive, unknown = ask(self.ids)
            if not alive and (cancelled or not unknown):
                break
            if time.monotonic() > deadline:
                return f"The jobs before it may still be in the queue: cancel them with `scancel {' '.join(bases)}`."
            time.sleep(LOOK_EVERY_S)
        for run in self.runs:
            queue.forget(run, self.ids)
            for path in (run / "slurm").glob("*"):
                if path.name.partition("_")[0] in bases:
                    _delete(path)
        for path in self.files:
            _delete(path)
        for path in reversed(self.made):
            if any(run in (path, *path.parents) for run in self.runs):
                _delete(path)
            else:  # a folder of runs: another one may have been made in it since
                with contextlib.suppress(OSError):
                    path.rmdir()
        return ""


def _cancel(ids: Sequence[str]) -> bool:
    """Cancel jobs; returns whether SLURM has said that it did."""
    try:
        return subprocess.run(["scancel", *ids], capture_output=True, timeout=ASK_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """`make` or `undo`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.cluster.traces", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (("make", "make RUN/slurm"), ("undo", "cancel jobs and delete what a submission wrote")):
        command = commands.add_parser(name, help=does)
        command.add_argument("run", type=Path, metavar="RUN", help="run directory, absolute")
    command.add_argument("--made", type=Path, nargs="*", default=[], metavar="DIR", help="what `make` printed")
    command.add_argument("--jobs", nargs="*", default=[], metavar="ID", help="those that were submitted")
    options = parser.parse_args(argv)
    if options.command == "make":
        traces = Traces([options.run])
        traces.make(options.run / "slurm")
        print(*traces.made, sep="\n")
    else:
        print(Traces([options.run], made=options.made, ids=options.jobs).undo())
    return 0


if __name__ == "__main__":
    sys.exit(main())
