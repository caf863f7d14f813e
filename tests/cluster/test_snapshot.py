"""The copy of the code in a run is whole, taken once, and not changed under jobs that use it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.cluster.snapshot import take
from trainer.errors import InputError
from trainer.run import code, jobs
from trainer.run.alive import Owner
from trainer.run.directory import RunDirectory
from trainer.run.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A little package."""
    root = tmp_path / "checkout"
    (root / "trainer").mkdir(parents=True)
    (root / "trainer" / "a.py").write_text("first")
    (root / "pyproject.toml").touch()
    return root


def says(state: str) -> Any:
    """squeue that says so of job 12."""
    return lambda command, **_: subprocess.CompletedProcess(command, 0, f"12|{state}|None|n1|1:00\n", "")


def test_a_copy_is_taken_once_and_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    taken = take(run)
    assert taken == run / "code" and (taken / "tools" / "make_shards.py").exists()
    assert not list(taken.rglob("__pycache__"))
    assert read_json(taken / "snapshot.json")["sha256"] == code.sha256() == code.sha256(taken)
    stamp = taken.stat().st_ino
    assert take(run) == taken and taken.stat().st_ino == stamp
    assert [path.name for path in run.iterdir()] == ["code"]
    RunDirectory(run).claim([1], resume=False, overwrite=False)
    told = "from trainer.run.directory import environment as e; from trainer.run.code import ROOT; print(ROOT)\n"
    told += "print(e()['git_commit'], e()['code_sha256'])"
    environment = {**os.environ, "PYTHONPATH": str(taken)}
    command = [sys.executable, "-c", told]
    out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(taken), str(code.code().git_commit), code.sha256()]


def test_a_copy_of_a_private_checkout_is_readable_by_whom_the_run_is(checkout: Path, tmp_path: Path) -> None:
    (checkout / "trainer" / "a.py").chmod(0o600)
    before = os.umask(0o022)
    try:
        take(tmp_path / "run", root=checkout)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    assert modes == {"code": 0o755, "trainer": 0o755, "a.py": 0o644, "snapshot.json": 0o644}


def test_a_copy_is_not_taken_of_itself(checkout: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    taken = take(run, root=checkout)
    (taken / "trainer" / "a.py").write_text("edited")
    assert take(run, root=taken) == taken
    assert take(tmp_path / "other", root=taken) == tmp_path / "other" / "code"
    assert (tmp_path / "other" / "code" / "trainer" / "a.py").read_text() == "edited"


def test_other_code_replaces_a_copy_that_nothing_uses(checkout: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    take(run, root=checkout)
    jobs.record(run, [jobs.Job("stage1", "12", "train", 1, time.time())])
    (checkout / "trainer" / "a.py").rename(checkout / "trainer" / "b.py")
    taken = take(run, root=checkout, ask=says("COMPLETED"))
    assert [path.name for path in (taken / "trainer").iterdir()] == ["b.py"]
    assert sorted(path.name for path in run.iterdir()) == ["code", "slurm"]


def test_other_code_is_refused_while_jobs_or_trainings_use_the_copy(checkout: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    take(run, root=checkout)
    (checkout / "trainer" / "a.py").write_text("second")
    jobs.record(run, [jobs.Job("report", "12", "report", None, time.time())])
    with pytest.raises(InputError, match=r"other code, with .* found jobs 12\. .*`scancel 12`"):
        take(run, root=checkout, ask=says("PENDING"))
    other = {"host": "here", "pid": os.getppid(), "machine": Owner.this().machine, "born": None, "time": 0.0}
    write_json(run / "stage2" / "starts" / "1.json", other)
    with pytest.raises(InputError, match="found a training of stage 2"):
        take(run, root=checkout, ask=says("COMPLETED"))
    assert (run / "code" / "trainer" / "a.py").read_text() == "first"


def test_a_folder_that_is_no_copy_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "code").mkdir(parents=True)
    with pytest.raises(InputError, match="is no copy of the code"):
        take(tmp_path / "run", root=checkout)


def test_a_start_with_other_code_than_was_submitted_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert jobs.other_code(tmp_path) is None, "nobody noted it"
    jobs.record(tmp_path, jobs.jobs_of(["stage1=12"], 0.0, code.sha256()))
    assert jobs.other_code(tmp_path) is None
    jobs.record(tmp_path, jobs.jobs_of(["stage1=12"], 0.0, "another"))
    assert "the code has changed since job 12 was submitted" in str(jobs.other_code(tmp_path))
