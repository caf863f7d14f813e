"""The cluster that all tests of this folder share: up in a second, and brought down whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.packages import need_command
from tests.slurm.lab import Cluster

COMMANDS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge"}
"""Commands that a cluster consists of, and the Debian packages that they are in."""


@pytest.fixture(scope="session")
def slurm() -> None:
    """What it takes to start a cluster, for tests that start one of their own."""
    for command, package in COMMANDS.items():
        need_command(command, package)
    if os.geteuid() != 0:
        pytest.skip("only root can give virtual nodes host names of their own")


@pytest.fixture(scope="session")
def shared_cluster(slurm: None) -> Iterator[Cluster]:
    """Two nodes, n1 and n2, with partitions main and urgent; up while tests use it."""
    with Cluster() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster; no module of tests leaves jobs to the next one."""
    yield shared_cluster
    shared_cluster.clear()
