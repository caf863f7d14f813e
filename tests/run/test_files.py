"""Files appear whole, with the modes of the umask, once; what the disk says names the file."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.links import NO_LINKS
from tests.permissions import bound_by_modes
from tests.pipes import line, tell
from trainer.errors import InputError
from trainer.run import checkpoint, files
from trainer.run.files import check_writable, names, new_whole, to_disk, whole, write_json, write_new, write_whole
from trainer.scoring.records import write_array, write_arrays

REFUSALS = [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV]
MAKE = """
import sys
from pathlib import Path
from trainer.run.files import write_new
print("ready", flush=True)
sys.stdin.readline()
print(*(n for n in range(200) if write_new(Path(sys.argv[1], f"{n}.json"), sys.argv[2] * 5000)), flush=True)
"""


@pytest.fixture(params=REFUSALS, ids=errno.errorcode.get)
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


@contextlib.contextmanager
def a_full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 20 kB: not around more than is tested, as pytest writes a log too."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_tensors(path: Path) -> None:
    checkpoint.write_tensors(path, {"a": torch.ones(40_000)})


def write_text(path: Path) -> None:
    write_whole(path, "a" * 100_000)


def write_npy(path: Path) -> None:
    write_array(path, np.ones(40_000))


def write_npz(path: Path) -> None:
    write_arrays(path, {"a": np.random.default_rng(0).random(40_000)})


def write_first(path: Path) -> None:
    assert write_new(path, "a" * 100_000)


def write_h5(path: Path) -> None:
    with new_whole(path, "--out") as aside, h5py.File(aside, "w") as file:
        file["a"] = np.ones(40_000)


WRITERS = [write_tensors, write_text, write_npy, write_npz, write_first, write_h5]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077], ids=oct)
@pytest.mark.parametrize("write", WRITERS)
def test_a_file_has_the_mode_of_the_umask(tmp_path: Path, write: Callable[[Path], None], umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "folder" / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    assert entries(tmp_path / "folder") == ["file"]


def test_a_file_without_hard_links_has_the_mode_of_the_umask_too(tmp_path: Path, no_links: None) -> None:
    before = os.umask(0o027)
    try:
        write_first(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_that_takes_no_more_is_named_with_the_file_and_nothing_is_left(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    with pytest.raises((OSError, InputError), match="File too large") as caught, a_full_disk():
        write(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert entries(tmp_path) == []


def test_a_new_file_that_cannot_be_filled_is_not_left_behind_without_hard_links(
    tmp_path: Path, no_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []

    def full_at_the_second(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 2:  # what was written aside fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/1'"):
        write_new(tmp_path / "1", "a")
    assert entries(tmp_path) == []
    assert write_new(tmp_path / "1", "a")


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "x.json") as aside:
        aside.write_text("half of it")
        raise ZeroDivisionError
    assert entries(tmp_path) == ["x.json"]
    assert files.read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize(
    ("make", "name", "error"),
    [
        (lambda folder: folder.chmod(0o555), "x", "Permission denied: '{}/x'"),
        (lambda folder: (folder / "x").write_text(""), "x/y", "Not a directory: '{}/x"),
        (lambda folder: (folder / "x").mkdir(), "x", "Is a directory: '{}/x'"),
        (lambda folder: None, "n" * 300, "File name too long: '{}/n"),
        (lambda folder: (folder / "x").symlink_to("x"), "x/y", "Too many levels of symbolic links|Not a directory"),
    ],
    ids=["read-only", "a file above", "a folder", "a long name", "a loop of links"],
)
@pytest.mark.parametrize("write", [write_text, write_tensors])
def test_where_no_file_can_be_the_error_names_it(
    tmp_path: Path, make: Callable[[Path], object], name: str, error: str, write: Callable[[Path], None]
) -> None:
    make(tmp_path)
    with bound_by_modes(), pytest.raises(OSError, match=error.format(tmp_path)):
        write(tmp_path / name)
    tmp_path.chmod(0o755)
    assert [name for name in entries(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_said_before_any_time_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert entries(tmp_path / "new" / "folder") == []

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(InputError, match=f"^{tmp_path}: cannot be written: {os.strerror(code)}. Choose another.$"):
        check_writable(tmp_path, "Choose another.")
    with (
        pytest.raises(InputError, match=f"--out: {tmp_path}/x cannot be written: {os.strerror(code)}"),
        new_whole(tmp_path / "x", "--out"),
    ):
        pass


def test_a_file_in_a_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match=f"{tmp_path}/x: cannot be written: Not a directory"):
        check_writable(tmp_path / "x")


def test_a_link_to_nothing_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("gone")
    with pytest.raises(InputError, match="x exists"), new_whole(tmp_path / "x", "--out"):
        pass
    assert (tmp_path / "x").is_symlink()


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_no_path_at_all_is_one_that_exists(path: str) -> None:
    with pytest.raises(InputError, match=r"--out: .* exists\. Choose another --out"), new_whole(Path(path), "--out"):
        pass


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o311)
    assert names(tmp_path) == ["closed"] and names(tmp_path / "gone") == []
    with bound_by_modes(), pytest.raises(PermissionError):
        names(tmp_path / "closed")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_flush_a_folder_is_used_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            to_disk(tmp_path)
    else:
        to_disk(tmp_path)
        write_whole(tmp_path / "x", "text")
        assert (tmp_path / "x").read_text() == "text"


def test_a_file_is_made_once_without_hard_links(tmp_path: Path, no_links: None) -> None:
    assert write_new(tmp_path / "1.json", "mine")
    assert not write_new(tmp_path / "1.json", "another's")
    assert (tmp_path / "1.json").read_text() == "mine"
    assert entries(tmp_path) == ["1.json"]


@pytest.mark.parametrize("without", [0, 2, 4], ids=lambda n: f"{n} of 4 have no links")
def test_of_processes_that_race_for_a_file_one_makes_it(tmp_path: Path, without: int) -> None:
    """Whether the file system has hard links, has none, or gives them to some hosts alone."""
    commands = [
        [sys.executable, "-c", (NO_LINKS if i < without else "") + MAKE, str(tmp_path), str(i)] for i in range(4)
    ]
    processes = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for command in commands]
    try:
        assert [line(process) for process in processes] == ["ready"] * 4
        for process in processes:
            tell(process)
        made = [[int(word) for word in line(process).split()] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(number for numbers in made for number in numbers) == list(range(200))
    for i, numbers in enumerate(made):
        assert all((tmp_path / f"{number}.json").read_text() == str(i) * 5000 for number in numbers)
    assert len(entries(tmp_path)) == 200
