"""The memory that a process may take, in laid out copies of /proc and /sys: what kills a job is seen before it does."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.memory import free_host_memory, memory_groups
from trainer.data.residence import free_memory

GB = 2**30
FREE = 200 * GB
NO_LIMIT = 9223372036854771712
"""What version 1 says where there is none."""
V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
V1 = "39 28 0:35 / /sys/fs/cgroup/memory rw,nosuid shared:15 - cgroup cgroup rw,memory"
V1_JOB = "/slurm/uid_1000/job_12/step_0/task_0"
V2_JOB = "/system.slice/slurmstepd.scope/job_12/step_0/user/task_0"


class Machine:
    """A folder with the files of /proc and /sys that matter."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def is_told(self, mountinfo: str, cgroup: str) -> Machine:
        """Write what the kernel tells of the mounts and of the process's own groups."""
        self._write("proc/meminfo", f"MemTotal: {FREE // 512} kB\nMemAvailable:   {FREE // 1024} kB\n")
        self._write("proc/self/mountinfo", f"24 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mountinfo}\n")
        self._write("proc/self/cgroup", f"{cgroup}\n")
        return self

    def group(self, path: str, limit: int | str, used: int, *, v1: bool = False, **more: str) -> Machine:
        """Write the files of a group; `path` is below /sys/fs/cgroup."""
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        for name, text in {names[0]: str(limit), names[1]: str(used), **more}.items():
            self._write(f"sys/fs/cgroup/{path.strip('/')}/{name}", f"{text}\n")
        return self

    def _write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    @property
    def free(self) -> int:
        """Bytes that the process may take."""
        return free_host_memory(self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine that nothing is written of."""
    return Machine(tmp_path)


def test_without_control_groups_the_machine_is_the_limit(machine: Machine) -> None:
    assert machine.is_told("", "").free == FREE


def test_the_limit_of_a_step_of_slurm_is_seen_in_version_2(machine: Machine) -> None:
    machine.is_told(V2, f"0::{V2_JOB}").group(V2_JOB, "max", 1 * GB)
    machine.group("/system.slice/slurmstepd.scope/job_12/step_0", 8 * GB, 3 * GB)
    assert machine.free == 5 * GB


def test_the_limit_of_a_step_of_slurm_is_seen_in_version_1(machine: Machine) -> None:
    machine.is_told(V1, f"11:cpuset:/slurm\n4:memory:{V1_JOB}\n1:name=systemd:/x\n0::/other")
    machine.group("memory", NO_LIMIT, 90 * GB, v1=True).group(f"memory{V1_JOB}", NO_LIMIT, 2 * GB, v1=True)
    machine.group("memory/slurm/uid_1000/job_12", 8 * GB, 2 * GB, v1=True)
    assert machine.free == 6 * GB


@pytest.mark.parametrize("depth", range(4))
def test_the_least_of_all_ancestors_counts(machine: Machine, depth: int) -> None:
    machine.is_told(V2, "0::/a/b/c")
    for level, path in enumerate(["", "a", "a/b", "a/b/c"]):
        machine.group(path, 7 * GB if level == depth else 50 * GB, 4 * GB)
    machine.group("a/b/c/below", 2 * GB, 1 * GB).group("other", 1 * GB, 1 * GB)
    assert machine.free == 3 * GB


def test_hybrid_reads_the_hierarchy_that_has_the_controller(machine: Machine) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    other = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
    machine.is_told(f"{other}\n{V1}\n{unified}", "5:cpu,cpuacct:/job\n4:hugetlb,memory:/job\n0::/job")
    machine.group("memory/job", 9 * GB, 2 * GB, v1=True).group("cpu,cpuacct/job", 1 * GB, 0, v1=True)
    (machine.root / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    assert machine.free == 7 * GB


def test_a_mount_in_an_unusual_place_is_found(machine: Machine) -> None:
    machine.is_told(r"9 1 0:9 / /sys/fs/cgroup/my\040groups rw - cgroup2 none rw", "0::/job")
    machine.group("my groups/job", 4 * GB, 1 * GB)
    assert machine.free == 3 * GB


@pytest.mark.parametrize(
    ("begins_at", "path", "folder"),
    [
        ("/", "/", ""),  # in a namespace of its own
        ("/docker/abc", "/docker/abc", ""),  # without one, but with a mount of its own group
        ("/docker/abc", "/docker/abc/job", "job"),
        ("/..", "/", ""),  # the mount is of before the namespace: what is between cannot be named
        ("/../..", "/", ""),
        ("/../..", "/../../job/step", "job/step"),
        ("/", "/..", ""),  # the process is outside of what it sees
        ("/", "/../../elsewhere", ""),
        ("/kubepods/pod7", "/docker/abc", ""),
        ("/", "/docker/abc", ""),  # a path of the host that is not there
    ],
)
def test_in_containers_what_can_be_seen_of_the_own_groups_counts(
    machine: Machine, begins_at: str, path: str, folder: str
) -> None:
    machine.is_told(V2.replace(" / /sys", f" {begins_at} /sys"), f"0::{path}")
    machine.group("", "max", 0).group(folder, 6 * GB, 2 * GB)
    assert machine.free == 4 * GB


def test_the_mount_of_another_container_is_not_asked_beside_the_own(machine: Machine) -> None:
    other = "50 1 0:30 /docker/def /sys/fs/cgroup/def rw - cgroup2 none rw"
    machine.is_told(f"{other}\n{V2}", "0::/docker/abc").group("def", 1 * GB, 0).group("docker/abc", 5 * GB, 0)
    assert machine.free == 5 * GB


@pytest.mark.parametrize("limit", ["max", NO_LIMIT, 2**63 - 1, "", "nonsense"])
def test_no_limit_is_none(machine: Machine, limit: int | str) -> None:
    assert machine.is_told(V2, "0::/job").group("job", limit, 3 * GB).free == FREE


def test_copies_of_files_that_nobody_uses_are_free(machine: Machine) -> None:
    stat = {"memory.stat": f"anon {GB}\nfile {6 * GB}\ninactive_file {4 * GB}\nactive_file {2 * GB}"}
    assert machine.is_told(V2, "0::/job").group("job", 8 * GB, 7 * GB, **stat).free == 5 * GB
    stat = {"memory.stat": f"inactive_file {1}\ntotal_inactive_file {3 * GB}"}
    machine.is_told(V1, "4:memory:/job").group("memory/job", 8 * GB, 7 * GB, v1=True, **stat)
    assert machine.free == 4 * GB


def test_a_group_that_would_be_slowed_down_is_full(machine: Machine) -> None:
    machine.is_told(V2, "0::/job").group("job", 9 * GB, 2 * GB, **{"memory.high": str(5 * GB)})
    assert machine.free == 3 * GB


def test_a_group_over_its_limit_leaves_nothing(machine: Machine) -> None:
    assert machine.is_told(V2, "0::/job").group("job", 1 * GB, 2 * GB).free == 0


NAMES = st.lists(st.sampled_from(["a", "b", "job_1", "x.slice"]), max_size=5)


@given(NAMES, NAMES)
def test_every_ancestor_below_the_mount_is_read_in_its_order(begins_at: list[str], rest: list[str]) -> None:
    with TemporaryDirectory() as folder:
        mount = f"1 1 0:1 /{'/'.join(begins_at)} /m rw - cgroup2 none rw"
        root = Machine(Path(folder)).is_told(mount, f"0::/{'/'.join([*begins_at, *rest])}").root
        found = [path.relative_to(root / "m").as_posix() for path, _ in memory_groups(root)]
    assert found == ["."] + ["/".join(rest[: n + 1]) for n in range(len(rest))]


def test_the_residence_of_data_asks_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.residence.free_host_memory", lambda: 12345)
    assert free_memory(torch.device("cpu")) == (None, 12345)
    monkeypatch.undo()
    assert 0 < free_memory(torch.device("cpu"))[1] < 2**50
