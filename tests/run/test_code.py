"""Which code runs is told of a checkout, of a copy of one, and of an installed package."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from trainer.errors import InputError
from trainer.run.code import Code, code, files, sha256


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A little package in a folder that git knows, with caches and strangers beside it."""
    root = tmp_path / "checkout"
    for name in ("trainer/a.py", "trainer/run/b.py", "slurm/job.sh", "tools/c.py", "pyproject.toml", "tests/d.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "trainer" / "__pycache__").mkdir()
    (root / "trainer" / "__pycache__" / "a.pyc").touch()
    (root / "tools" / ".cache").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "trainer"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    return root


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files(root)]


def test_the_code_is_the_package_and_what_jobs_need_without_caches(checkout: Path) -> None:
    assert names(checkout) == ["trainer/a.py", "trainer/run/b.py", "slurm/job.sh", "tools/c.py"]
    (checkout / "pyproject.toml").unlink()
    assert names(checkout) == ["trainer/a.py", "trainer/run/b.py"], "installed: its neighbours are strangers"


def test_the_number_tells_every_change_and_no_cache(checkout: Path) -> None:
    before = sha256(checkout)
    (checkout / "trainer" / "__pycache__" / "new.pyc").touch()
    assert sha256(checkout) == before
    (checkout / "tools" / "c.py").rename(checkout / "tools" / "d.py")
    renamed = sha256(checkout)
    (checkout / "trainer" / "a.py").write_text("changed")
    assert len({before, renamed, sha256(checkout)}) == 3


def test_a_checkout_says_its_commit_and_what_was_changed(checkout: Path) -> None:
    clean = code(checkout)
    assert clean.git_commit and len(clean.git_commit) == 40 and clean.git_diff == ""
    (checkout / "trainer" / "a.py").write_text("changed")
    changed = code(checkout)
    assert changed.git_commit == clean.git_commit and "+changed" in str(changed.git_diff)


def test_a_copy_inside_of_a_repository_says_what_it_was_taken_from(checkout: Path) -> None:
    copy = checkout / "output" / "run" / "code"
    shutil.copytree(checkout / "trainer", copy / "trainer")
    assert code(copy).git_commit == code(checkout).git_commit, "of the repository around it"
    Code("abc", "a diff", "0").write(copy)
    assert code(copy) == Code("abc", "a diff", sha256(copy))
    (copy / "snapshot.json").write_text("{}")
    with pytest.raises(InputError, match="says nothing of a copy"):
        code(copy)


def test_without_git_commit_and_diff_are_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert code(checkout) == Code(None, None, sha256(checkout))
