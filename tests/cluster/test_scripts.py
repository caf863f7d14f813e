"""The plain scripts of slurm/ with a SLURM that only writes down what it is asked: cores, ZeRO, and a refused chain."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.run import jobs as queue
from trainer.run.launch import zero_environment

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("SLURM_", "SRUN_", "SBATCH_", "ACCELERATE_", "MASTER_", "FMRI_FLOW_", "ZERO_STAGE")
Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(pretended: Path, tmp_path: Path) -> Call:
    """A function that runs a script of slurm/ as SLURM, or a person, does."""
    srun = pretended / "srun"
    srun.write_text(f'#!/bin/sh\n{{ echo "$@"; env; }} > {pretended}/srun.txt\n')
    srun.chmod(0o755)

    def call(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        environment |= {"FMRI_FLOW_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **settings}
        command = ["/bin/bash", str(ROOT / "slurm" / script), *arguments]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)

    return call


@pytest.fixture
def job(call: Call, pretended: Path, tmp_path: Path) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """A function that runs a batch script, and returns the words and the environment of its srun."""

    def job(script: str, *arguments: str, **settings: str) -> tuple[list[str], dict[str, str]]:
        given = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), **settings}
        done = call(script, "--run", str(tmp_path / "run"), *arguments, **given)
        assert done.returncode == 0, done.stderr
        words, *lines = (pretended / "srun.txt").read_text().splitlines()
        return words.split(), dict(line.split("=", 1) for line in lines if "=" in line)

    return job


@pytest.mark.parametrize("script", ["stage1.sbatch", "evaluate.sbatch", "report.sbatch", "shards.sbatch"])
def test_tasks_get_the_cores_that_sbatch_was_asked_for(
    script: str, job: Callable[..., tuple[list[str], dict[str, str]]]
) -> None:
    stage = ["--stage", "1"] if script.startswith("evaluate") else []
    words, environment = job(script, *stage, SLURM_CPUS_PER_TASK="6")
    assert "--cpus-per-task=6" in words[: words.index("-m")] and environment["SRUN_CPUS_PER_TASK"] == "6"
    words, _ = job(script, *stage, SLURM_CPUS_PER_TASK="6", SRUN_CPUS_PER_TASK="3")
    assert "--cpus-per-task=3" in words and "--cpus-per-task=6" not in words
    words, environment = job(script, *stage)
    assert not any("cpus-per-task" in word for word in words) and "SRUN_CPUS_PER_TASK" not in environment


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_training_is_told_what_it_shares_in_the_words_that_it_reads(
    stage: int, job: Callable[..., tuple[list[str], dict[str, str]]]
) -> None:
    words, environment = job("stage2.sbatch", "--zero-stage", str(stage), "--config", "c.yaml")
    assert {n: v for n, v in environment.items() if n.startswith("ACCELERATE_")} == zero_environment(stage)
    assert "--zero-stage" not in words and words[-4:] == ["c.yaml", "--stage", "2", "--resume"]


@pytest.mark.parametrize(
    ("script", "stage", "said"),
    [
        ("stage1.sbatch", "3", "--zero-stage: found 3, expected 0 (DDP), 1 or 2"),
        ("report.sbatch", "2", "--zero-stage: is for trainings, not for report"),
    ],
)
def test_what_cannot_be_shared_is_refused(script: str, stage: str, said: str, call: Call, tmp_path: Path) -> None:
    given = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = call(script, "--run", str(tmp_path / "run"), "--zero-stage", stage, **given)
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def submit(call: Call, tmp_path: Path, debug_config: Path) -> Call:
    """A function that submits the run tmp_path/output/run of configs/debug.yaml by slurm/submit.sh."""

    def submit(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        run = tmp_path / "output" / "run"
        return call("submit.sh", "--config", str(debug_config), "--run", str(run), *arguments, **settings)

    return submit


def test_a_chain_is_submitted_with_what_its_trainings_share(submit: Call, tmp_path: Path, pretended: Path) -> None:
    sbatch = pretended / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("#!/bin/sh\n", f'#!/bin/sh\necho "$*" >> {pretended}/asked\n', 1))
    done = submit("--zero-stage", "2", "seed=7")
    assert (done.returncode, done.stderr) == (0, "")
    names = re.findall(r"^(\w+): job (\d+)", done.stdout, re.MULTILINE)
    assert names == [
        ("stage1", "101"),
        ("evaluate1", "102"),
        ("stage2", "103"),
        ("evaluate2", "104"),
        ("report", "105"),
    ]
    assert [(found.name, found.id) for found in queue.read(tmp_path / "output" / "run")] == names
    asked = [line for line in (pretended / "asked").read_text().splitlines() if "--test-only" not in line]
    assert ["--zero-stage 2 seed=7" in line for line in asked] == [True, False, True, False, False]


@pytest.mark.parametrize("refused", ["stage1", "evaluate2"])
def test_a_refused_chain_is_taken_back_and_said_in_one_line(
    refused: str, submit: Call, pretended: Path, tmp_path: Path
) -> None:
    (pretended / "refuse").write_text(f"job-name={refused} ")
    done = submit()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {refused} was not submitted: Job violates accounting/QOS policy (partition? account? SBATCH_* in the "
        "environment?). Nothing of this submission is left.\n"
    )
    assert not (tmp_path / "output").exists()
    cancelled = pretended / "cancelled"
    assert (cancelled.read_text() if cancelled.exists() else "") == ("" if refused == "stage1" else "101 102 103\n")


def test_a_refused_chain_leaves_an_earlier_run_as_it_was(submit: Call, pretended: Path, tmp_path: Path) -> None:
    assert submit().returncode == 0
    run = tmp_path / "output" / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (pretended / "refuse").write_text("job-name=report ")
    assert submit("--no-requeue").returncode == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_mistake_in_options_is_found_before_anything_is_written(
    submit: Call, pretended: Path, tmp_path: Path
) -> None:
    (pretended / "refuse_test").write_text("job-name=stage2")
    done = submit()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: stage2 was not submitted: Invalid job array specification (partition?")
    assert not (tmp_path / "output").exists() and not (pretended / "count").exists()
    said = submit("--zero-stage", "3")
    assert (said.returncode, said.stderr) == (2, "error: --zero-stage: found 3, expected 0 (DDP), 1 or 2\n")
