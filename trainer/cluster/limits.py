"""How many jobs a cluster takes at once, and how long a job array may be, as far as SLURM tells.

    scontrol show config            MaxArraySize, MaxJobCount, max_array_tasks in SchedulerParameters
    sacctmgr show associations      MaxSubmitJobs of the user, where there is accounting

A sweep that is longer than an array may be becomes several arrays; one of more jobs than SLURM takes is refused before
anything is made. Where SLURM does not answer, its own default holds: arrays of at most 1001 elements, 0 to 1000.
"""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

ASK_S = 20
"""How long scontrol or sacctmgr may take."""
DEFAULT_ARRAY = 1001
"""SLURM's own MaxArraySize. The indices of an array are below it."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Limits:
    """What a cluster takes.

    Attributes:
        array: elements of a job array, at least 1.
        known: whether SLURM told that; else it is SLURM's default.
        jobs: how many a submission may have, each element of an array counted; None where no limit is known.
        name: the limit that `jobs` follows from.
    """

    array: int = DEFAULT_ARRAY
    known: bool = False
    jobs: int | None = None
    name: str = ""


def ask(account: str | None = None, *, run: Run = subprocess.run) -> Limits:
    """What this cluster says of its limits.

    Args:
        account: that the jobs ask for; None for the user's default.
        run: `subprocess.run`, or what stands for it in a test.
    """
    config = read_config(_answer(["scontrol", "show", "config"], run))
    if not config:
        return Limits()
    found: list[tuple[int, str]] = []
    if (count := _number(config.get("MaxJobCount"))) is not None:
        found.append((count - 1, f"MaxJobCount is {count}"))  # SLURM refuses the job that would reach it
    if config.get("AccountingStorageType", "").endswith("slurmdbd"):
        submit = read_submit_limit(_answer(_sacctmgr(config.get("ClusterName"), account), run))
        found += [] if submit is None else [(submit, f"MaxSubmitJobs is {submit}")]
    jobs, name = min(found, default=(None, ""))
    return Limits(array_size(config), "MaxArraySize" in config, jobs, name)


def read_config(text: str) -> dict[str, str]:
    """What `scontrol show config` prints, by name."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def array_size(config: dict[str, str]) -> int:
    """How many elements a job array may have; 1 where the site allows no arrays (MaxArraySize 0)."""
    tasks = re.search(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    size = _number(config.get("MaxArraySize"))
    return max(1, min(DEFAULT_ARRAY if size is None else size, int(tasks[1]) if tasks else 2**31))


def read_submit_limit(text: str) -> int | None:
    """The largest MaxSubmitJobs that `sacctmgr -nP` prints, a line an association; None where one has no limit."""
    limits = [_number(line) for line in text.splitlines()]
    known = [limit for limit in limits if limit is not None]
    return max(known) if limits and len(known) == len(limits) else None


def _sacctmgr(cluster: str | None, account: str | None) -> list[str]:
    which = [f"user={getpass.getuser()}", *([f"cluster={cluster}"] if cluster else [])]
    which += [f"account={account}"] if account else []
    return ["sacctmgr", "-n", "-P", "show", "associations", "where", *which, "format=MaxSubmitJobs"]


def _answer(command: list[str], run: Run) -> str:
    """What a program of SLURM prints; nothing where it is missing, fails, or takes too long."""
    try:
        done = run(command, capture_output=True, text=True, timeout=ASK_S, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdecimal() else None
