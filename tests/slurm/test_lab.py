"""The cluster of these tests: its nodes, its end without anything left, and what a wait in vain says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.packages import need_command
from tests.slurm.lab import SCRIPT, Cluster


def test_up_twice_is_one_cluster_and_down_leaves_no_process_and_no_file(slurm: None) -> None:
    with Cluster(requeue=False) as own:
        job = own.submit("lasting", ["setsid sleep 3600 &", "srun env -i sleep 3600"], "--nodes=2", "--requeue")
        own.wait_for(lambda: len(_sleeping(own)) == 3, "three processes of the job", jobs=[job])
        before = own.processes()
        own.up()
        assert own.processes() == before
        assert "JobRequeue              = 0" in own.scontrol("show", "config")
        own.down()
        own.down()
        assert own.processes() == []
        assert not any(_works(pid) for pid in before)
    assert not own.folder.exists()


def test_nodes_have_names_that_resolve_on_each_of_them_and_memory_of_their_own(cluster: Cluster) -> None:
    told = cluster.srun("--nodes=2", "bash", "-c", "touch /dev/shm/$(hostname); getent hosts n1 n2; cd /dev/shm; ls n?")
    words = told.stdout.split()
    assert sorted(words) == sorted(["127.0.1.1", "n1", "127.0.1.2", "n2"] * 2 + ["n1", "n2"])


def test_a_wait_in_vain_shows_what_the_job_said(cluster: Cluster) -> None:
    job = cluster.submit("failing", ["echo the reason", "exit 3"])
    with pytest.raises(pytest.fail.Exception, match=r"(?s)is FAILED, not COMPLETED.*ExitCode=3:0.*the reason"):
        cluster.wait_for_state(job, "COMPLETED")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)in vain for the moon.*the reason"):
        cluster.wait_for(lambda: False, "the moon", 0, [job])


def test_clear_leaves_no_job_to_the_next_module(cluster: Cluster) -> None:
    running = cluster.submit("lasting", ["sleep 3600"])
    waiting = cluster.submit("waiting", ["true"], f"--dependency=afterok:{running}")
    cluster.wait_for_state(running, "RUNNING")
    cluster.clear()
    assert [cluster.state(job) for job in (running, waiting)] == ["CANCELLED", "CANCELLED"]


def test_the_script_passes_shellcheck() -> None:
    command = [need_command("shellcheck", "shellcheck"), SCRIPT]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def _sleeping(cluster: Cluster) -> list[int]:
    return [pid for pid in cluster.processes() if _command(pid) == "sleep\0003600\0"]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _works(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
