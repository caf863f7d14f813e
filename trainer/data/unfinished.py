"""The folder in which shards stand until all are there, and what a restart may take from it.

    .OUT.building/owner.json          locked by the process that leads the build; says which host and process that is
    .OUT.building/start-N/shards/     the tars, and at the end the manifest; renamed to OUT when all is there
    .OUT.building/start-N/records/    one for each finished tar: its record, addresses, moments and the request
    .OUT.building/old/                what OUT held, for the moment of the exchange

A build that was killed or interrupted leaves this folder behind, and the next one to the same OUT goes on with the
finished tars of it that belong to the very same request. A build that failed (a bad run, a full disk) removes it: what
has to change then changes the request. Each start works in a folder of its own, so that a rank of a killed build that
still writes can do no harm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trainer.data.manifest import (
    MANIFEST,
    STATISTICS,
    ArrayLocation,
    FileRecord,
    Moments,
    Skipped,
    check_file,
    location_from_json,
)  # fmt: skip
from trainer.errors import InputError

OWNER = "owner.json"


@dataclass(frozen=True)
class ShardResult:
    """A written tar.

    Attributes:
        record: the file; None where all of its runs were left out.
        places: where the arrays lie, by run and by name.
        moments: by name, those of each written run along the first axis.
        skipped: the runs and scans that were left out.
        casts: moments before casts and of their errors, by name, along the first axis those of each run that has any.
        notes: what is odd about the data, for people to read, each with the key of the run.
    """

    record: FileRecord | None
    places: Mapping[str, Mapping[str, ArrayLocation]]
    moments: Mapping[str, Moments]
    skipped: Sequence[Skipped] = ()
    casts: Mapping[str, Moments] = field(default_factory=dict)
    notes: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class WorkFolder:
    """The folder of one start. `request` is a digest of all that decides about the bytes."""

    path: Path
    request: str

    @property
    def shards(self) -> Path:
        """Where the tars are written."""
        return self.path / "shards"

    @property
    def records(self) -> Path:
        """Where the records of finished tars are written."""
        return self.path / "records"

    def finish(self, name: str, result: ShardResult) -> None:
        """Write the record of a tar, whole: from then on a restart takes the tar as it is."""
        named = {"moments": result.moments, "casts": result.casts}
        document = {"request": self.request, **asdict(result), **{kind: list(found) for kind, found in named.items()}}
        tensors = {
            f"{kind}:{f.name}:{name}": np.ascontiguousarray(getattr(moments, f.name))
            for kind, found in named.items()
            for name, moments in found.items()
            for f in fields(moments)
        }
        aside = self.records / f".{name}"
        aside.write_bytes(save(tensors, {"document": json.dumps(document)}))  # `save_file` lets nobody else read it
        aside.rename(self.records / name)

    def finished(self, name: str) -> ShardResult | None:
        """What an earlier start wrote as this tar, or None where it did not, or the bytes are not those it wrote."""
        result = _read_record(self.records / name, self.request)
        try:
            if result is not None and result.record is not None:
                check_file(self.shards, result.record, full=True)
        except InputError:
            return None
        return result

    def take_over(self, earlier: WorkFolder) -> None:
        """Move what an earlier start finished for the same request here."""
        for path in sorted(earlier.records.glob("*")):
            result = _read_record(path, self.request)
            if result is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                if result.record is not None:
                    (earlier.shards / result.record.name).rename(self.shards / result.record.name)
                path.rename(self.records / path.name)


def _read_record(path: Path, request: str) -> ShardResult | None:
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads(file.metadata()["document"])
            if document["request"] != request:
                return None
            moments, casts = (
                {
                    name: Moments(*(file.get_tensor(f"{kind}:{f.name}:{name}") for f in fields(Moments)))
                    for name in document[kind]
                }
                for kind in ("moments", "casts")
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    record = document["record"]
    places = {
        key: {name: location_from_json(place) for name, place in arrays.items()}
        for key, arrays in document["places"].items()
    }
    skipped = tuple(Skipped(**s) for s in document["skipped"])
    return ShardResult(FileRecord(**record) if record else None, places, moments, skipped, casts, document["notes"])


def check_output(out: Path, overwrite: bool) -> None:
    """Raises InputError where `out` cannot be written, holds shards already, or holds anything else."""
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(out, "cannot be written", found=f"{above} is no folder that can be written to")
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    others = [n for n in names if n not in (MANIFEST, STATISTICS) and not n.endswith(".tar")]
    if others:
        raise InputError(out, "holds other files", found=others[0], expected="a new folder, or one of shards only")
    if names and not overwrite:
        raise InputError(out, "already holds shards", fix="Add --overwrite to replace them, or choose another folder.")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool, request: str) -> Iterator[WorkFolder]:
    """A folder whose `shards` take the place of `out` when the block ends.

    When the block fails all of it is removed; when it is interrupted, finished tars stay for the next start.
    """
    check_output(out, overwrite)
    out = Path(os.path.realpath(out))
    home = out.with_name(f".{out.name}.building")
    created = [p for p in out.parents if not p.exists()]
    owner = None
    try:
        owner = _claim(home, out)
        check_output(out, overwrite)  # another build may have ended, or an exchange that was cut short been undone
        work = _start(home, request)
        yield work
        _exchange(work.shards, home / "old", out)
        _remove(home)
    except BaseException as error:
        wanted = isinstance(error, KeyboardInterrupt) and any(home.glob("start-*/records/*"))
        if owner is not None and not wanted and (out.exists() or not (home / "old").exists()):
            _remove(home)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(out, f"cannot be written: {error.strerror or error}") from error
        raise
    finally:
        if owner is not None:
            owner.close()


def _start(home: Path, request: str) -> WorkFolder:
    """A new start's folder, with what the earlier ones finished."""
    earlier = sorted(home.glob("start-*"), key=lambda p: int(p.name.removeprefix("start-")))
    number = int(earlier[-1].name.removeprefix("start-")) + 1 if earlier else 1
    work = WorkFolder(home / f"start-{number}", request)
    work.shards.mkdir(parents=True)
    work.records.mkdir()
    for path in earlier:
        work.take_over(WorkFolder(path, request))
        shutil.rmtree(path, ignore_errors=True)
    return work


def _exchange(new: Path, old: Path, out: Path) -> None:
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        _undo_exchange(old, out)
        raise


def _undo_exchange(old: Path, out: Path) -> None:
    if old.exists() and not out.exists():
        old.rename(out)


def _remove(home: Path) -> None:
    """Take the folder away under another name first: from then on nobody finds it half there."""
    gone = home.with_name(f"{home.name}.removed-{os.getpid()}")
    with contextlib.suppress(OSError):
        home.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _claim(home: Path, out: Path) -> TextIO:
    """Become the one who builds `out`, until the returned file is closed or the process ends.

    The lock is the kernel's, so a stale one does not exist; where the file system has none, host and process decide.
    Raises InputError that names who builds it now.
    """
    while True:
        home.mkdir(parents=True, exist_ok=True)
        path = home / OWNER
        try:
            file = path.open("a+")
        except FileNotFoundError:  # the one who held it has just removed the folder
            continue
        try:
            _lock(file, home, out)
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                file.write(json.dumps({"host": platform.node(), "pid": os.getpid()}) + "\n")
                file.flush()
                break
        except BaseException:
            file.close()
            raise
        file.close()
    for left in glob.glob(f"{glob.escape(str(home))}.removed-*"):  # noqa: PTH207
        shutil.rmtree(left, ignore_errors=True)
    _undo_exchange(home / "old", out)
    shutil.rmtree(home / "old", ignore_errors=True)
    return file


def _lock(file: TextIO, home: Path, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        if not held and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
        owner = _read_owner(file)
        if held or _may_live(owner):
            raise InputError(
                out,
                "is being built already",
                found=f"process {owner.get('pid', '?')} on host {owner.get('host', '?')}",
                fix="Wait for it or end it." if held else f"Wait for it or end it; if it is dead, remove {home}.",
            ) from error


def _read_owner(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError):
        return {}


def _may_live(owner: Mapping[str, Any]) -> bool:
    """Whether a build that says so may still be at work; of another host nobody can tell."""
    if not owner or owner.get("host") != platform.node():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
