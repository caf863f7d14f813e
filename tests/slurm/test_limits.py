"""What a cluster does not take: arrays that are too long, too many jobs, a chain of which one job is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.slurm.lab import ROOT, Cluster
from trainer.run import jobs as queue

pytestmark = pytest.mark.slow

LATER = "{begin: now+1hour}"
Submit = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="module")
def narrow(slurm: None) -> Iterator[Cluster]:
    """A cluster whose arrays have at most three elements, and whose controller holds at most 40 jobs."""
    with Cluster(limits=(3, 41)) as own:
        yield own


@pytest.fixture
def submit(narrow: Cluster, tmp_path: Path, tiny_shards: Path) -> Iterator[Submit]:
    """A function that submits a sweep over so many seeds, whose jobs begin in an hour; no job is left of a test."""
    (tmp_path / "site.yaml").write_text("{partition: main, time: 60}")

    def submit(seeds: int, *arguments: str, **settings: str) -> CompletedProcess[str]:
        (tmp_path / "sweep.yaml").write_text(f"{{seed: {list(range(seeds))}}}")
        files = ["--config", str(ROOT / "configs" / "debug.yaml"), "--slurm", str(tmp_path / "site.yaml")]
        options = ["--run", str(tmp_path / "home"), "--array", str(tmp_path / "sweep.yaml")]
        command = [sys.executable, ROOT / "slurm" / "pipeline.py", *files, *options, f"data.shards={tiny_shards}"]
        return narrow.run(*command, *arguments, check=False, **settings)

    yield submit
    narrow.clear()


def test_a_sweep_longer_than_an_array_is_several_with_their_own_stage_2(
    submit: Submit, narrow: Cluster, tmp_path: Path
) -> None:
    done = submit(5, f"slurm.sbatch={LATER}")
    assert done.returncode == 0, done.stderr
    assert "job arrays of at most 3 runs each: as MaxArraySize says" in done.stdout
    jobs = {n: {job.name: job.id for job in queue.read(tmp_path / "home" / f"seed={n}")} for n in range(5)}
    for stage in ("stage1", "stage2"):
        arrays = [jobs[n][stage].split("_")[0] for n in range(5)]
        assert arrays[0] == arrays[1] == arrays[2] != arrays[3] == arrays[4]
        assert [jobs[n][stage].split("_")[1] for n in range(5)] == ["0", "1", "2", "0", "1"]
    for n in (0, 3):
        first, second = (jobs[n][stage].split("_")[0] for stage in ("stage1", "stage2"))
        assert f"aftercorr:{first}_*" in narrow.facts(second)["Dependency"]


def test_more_jobs_than_the_controller_holds_are_refused_before_anything_is_made(
    submit: Submit, narrow: Cluster, tmp_path: Path
) -> None:
    done = submit(10)
    assert done.returncode == 2
    assert "found 41 of training, scoring and the report, expected at most 40 (MaxJobCount is 41)" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "home").exists()


def test_where_scontrol_does_not_tell_a_long_array_is_refused_before_anything_is_made(
    submit: Submit, narrow: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("sbatch", "squeue", "scancel", "sinfo", "bash", "git"):
        if found := shutil.which(name):
            (path / name).symlink_to(found)
    done = submit(5, PATH=str(path))
    assert done.returncode == 2
    assert "stage1: SLURM says: Invalid job array specification" in done.stderr and "MaxArraySize" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "home").exists()
    assert not narrow.run("squeue", "--noheader").stdout


def test_when_a_later_job_is_refused_what_had_begun_ends_and_nothing_is_left(
    submit: Submit, narrow: Cluster, tmp_path: Path
) -> None:
    before = len(narrow.squeue())
    done = submit(2, "--snapshot", "slurm.stage2.sbatch={reservation: nope}")
    assert done.returncode == 2
    assert "stage2: SLURM says: Requested reservation is invalid" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "home").exists()
    assert not narrow.run("squeue", "--noheader").stdout
    ended = narrow.squeue("--array", "--format=%T")[before:]
    assert ended and set(ended) <= {"CANCELLED", "FAILED"}, "those of stage 1 and their workers were cancelled"
