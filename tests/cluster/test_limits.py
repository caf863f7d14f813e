"""What SLURM says of the jobs that it takes, and its own defaults where it says nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from trainer.cluster.limits import Limits, array_size, ask, read_config, read_submit_limit

CONFIG = """Configuration data as of 2024-05-01T12:00:00
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = big
MaxArraySize            = 1001
MaxJobCount             = 10000
SchedulerParameters     = bf_interval=30,sched_interval=2
Slurmctld(primary) at head is UP
"""


class Site:
    """Stands for subprocess.run: what the programs of a site print."""

    def __init__(self, config: str | Exception, associations: str | Exception = "") -> None:
        self.answers, self.asked = {"scontrol": config, "sacctmgr": associations}, list[Sequence[str]]()

    def __call__(self, command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        answer = self.answers[command[0]]
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, answer, "")


def test_a_site_tells_how_long_arrays_are_and_how_many_jobs_it_takes() -> None:
    site = Site(CONFIG, "500\n200\n")
    assert ask("mine", run=site) == Limits(1001, True, 500, "MaxSubmitJobs is 500")
    assert "account=mine" in site.asked[1] and "cluster=big" in site.asked[1]
    assert ask(run=Site(CONFIG, "\n")) == Limits(1001, True, 9999, "MaxJobCount is 10000")
    assert ask(run=Site(CONFIG, FileNotFoundError())).jobs == 9999


def test_without_accounting_it_is_not_asked() -> None:
    site = Site(CONFIG.replace("slurmdbd", "none"))
    assert ask(run=site).jobs == 9999 and len(site.asked) == 1


@pytest.mark.parametrize(
    "answer", [FileNotFoundError(), PermissionError(), subprocess.TimeoutExpired("scontrol", 20), ""]
)
def test_a_site_that_does_not_answer_has_the_default_of_slurm(answer: str | Exception) -> None:
    assert ask(run=Site(answer)) == Limits(array=1001, known=False, jobs=None)


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("MaxArraySize = 5001", 5001), ("MaxArraySize = 1", 1), ("MaxArraySize = 0", 1), ("MaxArraySize = ", 1001),
        ("MaxArraySize = 4000001\nSchedulerParameters = bf_x,max_array_tasks=1000", 1000),
        ("MaxArraySize = 10\nSchedulerParameters = max_array_tasks=1000", 10),
    ],
)  # fmt: skip
def test_the_elements_of_an_array_are_bounded(said: str, size: int) -> None:
    assert array_size(read_config(said)) == size


@pytest.mark.parametrize(
    ("said", "limit"), [("", None), ("\n", None), ("10\n", 10), ("10\n\n", None), ("10\n300\n", 300), ("-1", None)]
)
def test_of_several_associations_the_most_generous_counts(said: str, limit: int | None) -> None:
    assert read_submit_limit(said) == limit
