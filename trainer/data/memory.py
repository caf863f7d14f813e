"""How much memory this process may still take: what the machine has free, and what its control groups leave of it.

A job of SLURM, a container and a service each run in a control group, whose limit the kernel enforces by killing. The
limit stands at the process's own path, or at any ancestor of it, and not at the root that every machine has. Linux
tells where: /proc/self/cgroup has the path in each hierarchy (version 1 has one a controller, version 2 a single one,
a hybrid both), and /proc/self/mountinfo where each hierarchy is mounted, and which of its groups the mount begins at
(see cgroups(7) and proc(5)).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Version:
    """The files of one version of the memory controller.

    Attributes:
        limits: of a group in bytes, or `max`. Above memory.high a group is not killed but slowed down to a crawl.
        cache: the line of memory.stat with the bytes of the usage that are copies of files nobody uses at present: the
            kernel takes them back before it kills, so they are free, as in the machine's MemAvailable.
    """

    limits: tuple[str, ...]
    usage: str
    cache: str


_VERSIONS = {
    "cgroup": _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    "cgroup2": _Version(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of every control group that it belongs to.

    Args:
        root: where /proc and /sys are; a test lays out its own.
    """
    left = [_left_in(folder, version) for folder, version in memory_groups(root)]
    return min([_available(root), *(bytes_ for bytes_ in left if bytes_ is not None)])


def _available(root: Path) -> int:
    """What the machine has free."""
    lines = (root / "proc" / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def memory_groups(root: Path = Path("/")) -> Iterator[tuple[Path, _Version]]:
    """The folders of this process's memory control group and of all its ancestors that can be seen from here."""
    mounts = list(_mounts(_text(root / "proc" / "self" / "mountinfo")))
    for kind, path in _paths(_text(root / "proc" / "self" / "cgroup")):
        own = [mount for mount in mounts if mount.kind == kind]
        below = {mount: _below(path, mount.begins_at) for mount in own}
        # a mount that begins elsewhere is of another container; where there is no other, its limit is better than none
        for mount in [mount for mount in own if below[mount] is not None] or own:
            folder = root / mount.point.relative_to("/")
            yield folder, _VERSIONS[kind]
            for part in below[mount] or ():
                folder = folder / part
                yield folder, _VERSIONS[kind]


@dataclass(frozen=True)
class _Mount:
    """A hierarchy that is mounted: its kind, where, and which of its groups stands there."""

    kind: str
    point: PurePosixPath
    begins_at: str


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    """The mounts that hold the memory controller, or may (version 2)."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        place, kind = before.split(), after.split()
        if len(place) < 5 or not kind or kind[0] not in _VERSIONS:
            continue
        if kind[0] == "cgroup2" or "memory" in kind[-1].split(","):
            yield _Mount(kind[0], PurePosixPath(_unescaped(place[4])), _unescaped(place[3]))


def _paths(cgroup: str) -> Iterator[tuple[str, str]]:
    """The process's own group by kind of hierarchy, from lines `4:memory:/job_12/step_0` and `0::/job_12/step_0`."""
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            yield "cgroup", path
        elif (number, controllers) == ("0", ""):
            yield "cgroup2", path


def _below(path: str, begins_at: str) -> tuple[str, ...] | None:
    """The names that lead from the group where a mount begins to another group; None where these are not known.

    In a namespace of control groups both are told as seen from the namespace's own root; what is above that is `/..`,
    and the names of what is between are hidden.
    """
    above, names = _split(path)
    mount_above, mount_names = _split(begins_at)
    if mount_above > above and not mount_names:
        return ()  # of an ancestor, at least its own limit is seen
    if (mount_above, mount_names) == (above, names[: len(mount_names)]):
        return names[len(mount_names) :]
    return None


def _split(path: str) -> tuple[int, tuple[str, ...]]:
    """How many levels above its namespace's root a path begins, and the names from there."""
    parts = [part for part in path.split("/") if part]
    above = next((n for n, part in enumerate(parts) if part != ".."), len(parts))
    return above, tuple(parts[above:])


def _left_in(folder: Path, version: _Version) -> int | None:
    """Bytes that a control group leaves; None where it has no limit."""
    limits = [limit for name in version.limits if (limit := _number(folder / name)) is not None]
    used = _number(folder / version.usage)
    if not limits or used is None:
        return None
    found = re.search(rf"^{version.cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(min(limits) - used + (int(found[1]) if found else 0), 0)


def _number(path: Path) -> int | None:
    """A number in a file; None where it cannot be read, or says `max`."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """What stands in a file of the kernel's; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    r"""A field of mountinfo, in which a space is written \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
