"""Remote shards, copied once per node into a local folder, and read there like any others.

Each manifest has a folder of its own, named by its content. A file is written aside, compared with the manifest's
SHA-256 and renamed, so what has its name is whole. Processes that start together share the work: each file is copied by
whoever locks it first. Locks are the kernel's (flock), which no crash leaves behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import select
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from webdataset import gopen

from trainer.data.manifest import MANIFEST, FileRecord, Manifest
from trainer.errors import InputError
from trainer.paths import is_remote

STALLED_S = 120.0
"""A source that gives no byte for so long is given up."""
PATIENCE_S = 3600.0
"""How long a process waits for another one that copies the same file."""
_BLOCK = 1 << 20
_IN_USE = ".in_use"
# The folders that this process uses stay locked, and so are not removed by others, until it ends.
_HELD: dict[Path, int] = {}


def local_folder(shards: str, cache_dir: str | None, cache_gb: float) -> Path:
    """The folder to read: `shards` itself, or the copy of a remote one, filled where something is missing.

    Args:
        shards: a folder, or `http(s)://HOST/FOLDER`, `s3://BUCKET/FOLDER` (by the `aws` command), or `pipe:COMMAND`,
            whose output is the file that `{name}` in it stands for (without `{name}`, `/NAME` is appended).
        cache_dir: of the copies; None for a folder of this user's among the temporary files.
        cache_gb: what all copies may need together.

    Raises:
        InputError: something cannot be fetched, differs from the manifest, or does not fit.
    """
    if not is_remote(shards):
        return Path(shards)
    cache = Path(cache_dir or Path(tempfile.gettempdir(), f"fmri-flow-{os.getuid()}"))
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder, manifest = _fetch_manifest(shards, cache)
        _make_room(cache, folder, manifest, int(cache_gb * 1e9))
        _fetch_all(shards, folder, [manifest.statistics, *manifest.shards])
    except OSError as error:
        where = f"{cache} (data.cache_dir)"
        raise InputError(where, f"cannot be filled from {shards}: {error.strerror or error}") from error
    return folder


def source_url(shards: str, name: str) -> str:
    """What webdataset's opener is given for one file."""
    if shards.startswith("s3:"):  # for which webdataset has no opener of its own
        return f"pipe:aws s3 cp {shlex.quote(shards.rstrip('/') + '/' + name)} -"
    return shards.replace("{name}", name) if "{name}" in shards else f"{shards.rstrip('/')}/{name}"


def _fetch_manifest(shards: str, cache: Path) -> tuple[Path, Manifest]:
    """Ask the source which shards it holds now; their folder in the cache has the manifest when this returns."""
    aside = Path(tempfile.mkdtemp(prefix=".manifest-", dir=cache))
    try:
        digest = _download(source_url(shards, MANIFEST), aside / MANIFEST)
        manifest = Manifest.read(aside)
        folder = cache / digest[:24]
        _hold(folder)
        (aside / MANIFEST).replace(folder / MANIFEST)
    except InputError as error:
        raise InputError(f"data.shards: {source_url(shards, MANIFEST)}", str(error).replace(f"{aside}/", "")) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder, manifest


def _hold(folder: Path) -> None:
    """Make a folder, and mark it as used by this process from now until the process ends."""
    path = folder / _IN_USE
    while folder not in _HELD:
        folder.mkdir(exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for no longer than another process needs to remove the folder
            if path.stat().st_ino == os.fstat(file).st_ino:
                _HELD[folder] = file
            else:
                os.close(file)
        except FileNotFoundError:
            continue  # removed since: again
    os.utime(path)


def _make_room(cache: Path, folder: Path, manifest: Manifest, limit: int) -> None:
    """Remove files of other folders, those used longest ago first, until the shards of `folder` fit beside the rest.

    Folders that any process uses are left alone.
    """
    needed = sum(record.size for record in (manifest.statistics, *manifest.shards))
    if needed > limit:
        raise InputError(
            "data.cache_gb", "less than the shards need", found=f"{limit / 1e9:g}", expected=f"{needed / 1e9:.3g}"
        )
    others = [path for path in cache.iterdir() if path.is_dir() and path != folder and not path.name.startswith(".")]
    used = {path: _size(path) for path in others}
    for other in sorted(others, key=_last_use):
        if sum(used.values()) + needed <= limit:
            return
        used[other] -= _remove_unused(other, sum(used.values()) + needed - limit)
    if sum(used.values()) + needed > limit:
        raise InputError(
            "data.cache_gb",
            f"other runs use copies in {cache}",
            found=f"{limit / 1e9:g}",
            expected=f"{(sum(used.values()) + needed) / 1e9:.3g} for all of them",
        )


def _last_use(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / _IN_USE).stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _remove_unused(folder: Path, excess: int) -> int:
    """Remove files of a folder that no process uses, until `excess` bytes are gone; returns the bytes removed."""
    with _try_lock(folder / _IN_USE) as alone:
        if not alone:
            return 0
        removed = 0
        for path in sorted(folder.iterdir(), key=lambda p: p.name in (MANIFEST, _IN_USE)):
            if removed >= excess and path.name != _IN_USE:
                return removed
            removed += path.stat().st_size
            path.unlink()
        folder.rmdir()
    return removed


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether the lock of a file could be taken at once; held inside the block."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(file)


def _fetch_all(shards: str, folder: Path, records: Sequence[FileRecord]) -> None:
    """Copy what is missing. A file that another process copies is left for later; at the end it is waited for."""
    deadline = time.monotonic() + PATIENCE_S
    missing = [record for record in records if not _is_there(folder, record)]
    while missing:
        for record in missing:
            with _try_lock(folder / f".{record.name}.lock") as ours:
                if ours and not _is_there(folder, record):
                    _fetch(shards, folder, record)
                    deadline = time.monotonic() + PATIENCE_S
        missing = [record for record in missing if not _is_there(folder, record)]
        if missing and time.monotonic() > deadline:
            raise InputError(
                folder / missing[0].name,
                f"another process has not finished its copy in {PATIENCE_S:.0f} s",
                fix="End that process, or choose another data.cache_dir.",
            )
        if missing:
            time.sleep(0.1)


def _is_there(folder: Path, record: FileRecord) -> bool:
    try:
        return (folder / record.name).stat().st_size == record.size
    except FileNotFoundError:
        return False


def _fetch(shards: str, folder: Path, record: FileRecord) -> None:
    """Copy one file, under its lock."""
    url, aside = source_url(shards, record.name), folder / f".{record.name}.part"
    try:
        digest = _download(url, aside)
        size = aside.stat().st_size
        for what, found, expected in (
            ("size", f"{size} bytes", f"{record.size} bytes"),
            ("SHA-256", digest, record.sha256),
        ):
            if found != expected:
                fix = "Copy the shards to their place again: they differ from their manifest."
                raise InputError(f"data.shards: {url}", what, found=found, expected=expected, fix=fix)
        aside.replace(folder / record.name)
    finally:
        aside.unlink(missing_ok=True)


def _download(url: str, path: Path) -> str:
    """Write what a URL gives into a file; returns its SHA-256. Raises InputError where it fails or stalls."""
    digest = hashlib.sha256()
    try:
        stream = gopen(url, "rb")
    except (OSError, ValueError) as error:
        raise InputError(f"data.shards: {url}", f"cannot be opened: {error}") from error
    try:
        with path.open("wb") as file:
            for block in _blocks(stream, url):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())  # only its size is compared from now on
    except BaseException:
        process = getattr(stream, "proc", None)
        if process is not None:
            process.kill()
        with contextlib.suppress(OSError):
            stream.close()
        raise
    try:
        stream.close()  # where a command that failed says so
    except OSError as error:
        code = re.search(r"exit (-?\d+)", str(error))
        raise InputError(
            f"data.shards: {url}",
            "cannot be fetched",
            found=f"exit status {code.group(1)} of the command" if code else str(error),
            fix="Try the URL by hand: curl -f for http(s), aws s3 cp for s3, the command itself for pipe.",
        ) from error
    return digest.hexdigest()


def _blocks(stream: IO[bytes] | Any, url: str) -> Iterator[bytes]:
    """What a stream of webdataset gives, block by block, with a bound on the wait for each."""
    pipe = getattr(stream, "stream", stream)  # its wrapper of commands has no fileno
    file = pipe.fileno()
    while True:
        if not select.select([file], [], [], STALLED_S)[0]:
            raise InputError(f"data.shards: {url}", f"no byte came in {STALLED_S:.0f} s")
        block = os.read(file, _BLOCK)
        if not block:
            return
        yield block
