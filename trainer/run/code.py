"""Which code runs: its commit and diff, and one number over all its files.

The code is the package and, where it lies in a checkout or in a copy of one that a run took (`cluster.snapshot`), what
the jobs need beside it. Such a copy is asked before git is: a run directory often lies inside of some repository, whose
commit says nothing of the copy.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import InputError
from trainer.run.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "trainer"
BESIDE = ("slurm", "tools")
"""What the jobs need beside the package; of an installed package, whose neighbours are strangers, nothing is."""
SNAPSHOT = "snapshot.json"
_NOT_CODE = ("__pycache__",)


@dataclass(frozen=True)
class Code:
    """What code it is.

    Attributes:
        git_commit: of the checkout; None where it was none.
        git_diff: what had been changed since, of the files that git knows.
        sha256: over the names and bytes of all files.
    """

    git_commit: str | None
    git_diff: str | None
    sha256: str

    def write(self, folder: Path) -> None:
        """Say it in a copy of the code."""
        write_json(folder / SNAPSHOT, asdict(self))


def code(root: Path = ROOT) -> Code:
    """What the code under `root` is now. Of a copy, commit and diff are those that it was taken from."""
    noted = snapshot_of(root)
    if noted is not None:
        return Code(noted.git_commit, noted.git_diff, sha256(root))
    return Code(_git(root, "rev-parse", "HEAD"), _git(root, "diff", "HEAD"), sha256(root))


def snapshot_of(root: Path) -> Code | None:
    """What a copy of the code was when it was taken; None where `root` is no copy."""
    path = root / SNAPSHOT
    if not path.exists():
        return None
    noted = read_json(path)
    try:
        return Code(**noted)
    except TypeError as error:
        raise InputError(path, "says nothing of a copy of the code", found=error) from error


def files(root: Path = ROOT) -> Iterator[Path]:
    """The files of the code, in the order of their names, without caches."""
    whole = any((root / name).exists() for name in (SNAPSHOT, "pyproject.toml"))
    for folder in (PACKAGE, *(BESIDE if whole else ())):
        for path in sorted((root / folder).rglob("*")):
            hidden = any(part.startswith(".") or part in _NOT_CODE for part in path.relative_to(root).parts)
            if path.is_file() and not hidden:
                yield path


def sha256(root: Path = ROOT) -> str:
    """One number over the names and bytes of the code's files."""
    total = hashlib.sha256()
    for path in files(root):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    """git's answer about the code, or None where it is no checkout."""
    try:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
