"""A real Slurm cluster of virtual nodes on this machine, as the tests see it: commands, waits that end, and logs.

`cluster.sh` starts and ends it. Commands run here, beside the nodes, as on a login node; jobs find this checkout and
this Python. A wait that is in vain fails with the state of the job and the ends of its logs, for a test on a real
cluster that only says "False is not true" cannot be repaired.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
WAIT_SECONDS = 240
"""A bound for what takes seconds, on a machine that may be busy."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "PMI", "OMPI_", "MV2_", "ACCELERATE_", "MASTER_", "FMRI_FLOW_", "CLUSTER_")
"""What the environment of the tests may hold of a launcher that started them."""


class Cluster:
    """A cluster while it is entered; nothing of it is left behind, neither processes nor files.

    Args:
        nodes: how many; they are called n1, n2, ...
        requeue: whether jobs that do not say may be requeued (JobRequeue).
        limits: MaxArraySize and MaxJobCount.
    """

    def __init__(self, *, nodes: int = 2, requeue: bool = True, limits: tuple[int, int] = (1001, 10_000)) -> None:
        self.hosts = [f"n{i}" for i in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # sockets in it: their paths must be short
        settings = {"DIR": self.folder, "NODES": nodes, "PORT": _free_ports(nodes + 1), "REQUEUE": int(requeue)}
        settings |= {"ARRAY": limits[0], "JOBS": limits[1]}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self._starter = kept | {f"CLUSTER_{name}": str(value) for name, value in settings.items()}
        self.environment = {
            **kept,
            "PATH": f"{kept.get('PATH', '')}{os.pathsep}/usr/sbin",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # with all its transports, what MPICH tells of itself is at times longer than SLURM 22.05's PMI-2 can read
            "UCX_TLS": "tcp,self",
        }
        """Of everything that is run on the cluster, and of what submits to it."""

    def __enter__(self) -> Cluster:
        try:
            self._script("up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.down()
        shutil.rmtree(self.folder)

    def up(self) -> None:
        """Start it anew, unless it runs."""
        self._script("up")

    def down(self) -> None:
        """End it, with its jobs, at once."""
        self._script("down")

    def processes(self) -> list[int]:
        """The daemons, and whatever runs on the nodes."""
        return [int(pid) for pid in self._script("processes").split()]

    def _script(self, what: str) -> str:
        # to a file: the daemons inherit what it writes to, and would keep a pipe open
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run([SCRIPT, what], env=self._starter, stdout=said, stderr=said, timeout=WAIT_SECONDS)
            said.seek(0)
            assert done.returncode == 0, f"cluster.sh {what}: {said.read()}"
            said.seek(0)
            return said.read()

    def run(
        self, *command: str | Path, check: bool = True, seconds: float = WAIT_SECONDS, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, with `settings` added to its environment; fails where it does.

        Args:
            check: whether an exit status that is not 0 fails the test.
            seconds: after so many it fails.
        """
        words = [str(word) for word in command]
        environment = self.environment | settings
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            pytest.fail(f"{' '.join(words)}: status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done

    def srun(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run tasks in an allocation of their own and wait for them; `options` as for `run`."""
        return self.run("srun", "--immediate=120", *arguments, **options)

    def sbatch(self, *arguments: str | Path, **options: Any) -> str:
        """Submit a script; returns the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, **options).stdout.split(";")[0].strip()

    def submit(self, name: str, lines: Sequence[str], *arguments: str, **options: Any) -> str:
        """Submit lines of bash; their output is in the folder of the cluster, and shown where a wait fails."""
        script = self.folder / f"{name}.sbatch"
        script.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        return self.sbatch(f"--output={self.folder}/{name}.%j.out", "--open-mode=append", *arguments, script, **options)

    def scontrol(self, *arguments: str, check: bool = True) -> str:
        """What scontrol says."""
        return self.run("scontrol", *arguments, check=check, seconds=60).stdout

    def squeue(self, *arguments: str) -> list[str]:
        """The lines that squeue prints, without the header: of running jobs and of those that have ended."""
        return self.run("squeue", "--noheader", "--states=all", *arguments, seconds=60).stdout.splitlines()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job, by its names: JobState, Restarts, NodeList, ..."""
        words = self.scontrol("--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.facts(job)["JobState"]

    def wait_for(
        self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS, jobs: Sequence[str] = ()
    ) -> Any:
        """Wait until something is true, and return it; else fail, with the logs of `jobs`."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                pytest.fail(f"waited in vain for {what}\n{self.report(*jobs)}")
            time.sleep(0.2)
        return found

    def wait_for_state(self, job: str, *states: str, seconds: float = WAIT_SECONDS) -> str:
        """Wait until a job is in one of the states, and return it; fails once it ended in another one."""

        def reached() -> str | None:
            state = self.state(job)
            if state in OVER and state not in states:
                pytest.fail(f"job {job} is {state}, not {' or '.join(states)}\n{self.report(job)}")
            return state if state in states else None

        return str(self.wait_for(reached, f"job {job} to be {' or '.join(states)}", seconds, [job]))

    def clear(self) -> None:
        """Cancel all jobs and wait until they are gone."""

        def idle() -> bool:
            self.run("scancel", "--quiet", "--user=root", check=False)
            return not self.run("squeue", "--noheader").stdout

        self.wait_for(idle, "an empty queue")

    def report(self, *jobs: str) -> str:
        """The queue, and of each job what Slurm knows and the ends of its logs: for a person who repairs a test."""
        told = ["\n".join(self.squeue())]
        for job in jobs:
            facts = self.facts(job)
            paths = {Path(facts[name]) for name in ("StdOut", "StdErr") if name in facts}
            steps = [path for folder in {p.parent for p in paths} for path in folder.glob(f"{job}_*_log.*")]
            told += [f"{name}={value}" for name, value in facts.items() if name.startswith(("Job", "Exit", "Reason"))]
            told += [_end(path) for path in sorted({*paths, *steps})]
        return "\n".join([*told, *(_end(path) for path in sorted(self.folder.glob("slurmctld.log")))])


def _end(path: Path, size: int = 4000) -> str:
    text = path.read_text(errors="replace") if path.is_file() else "is missing"
    return f"--- {path}\n{text[-size:]}"


def _free_ports(number: int) -> int:
    """The first of some free ports in a row: above those that `launch.master_port` gives, below those of clients."""
    for _ in range(1000):
        first = random.randrange(30_000, 32_700 - number)
        if all(map(_is_free, range(first, first + number))):
            return first
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
