"""slurm/pipeline.py on a real cluster: 2 nodes x 2 tasks, their order, errors, what a failure cancels."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.slurm.lab import ROOT, Cluster
from trainer.run import jobs as queue
from trainer.run.directory import RunDirectory
from trainer.run.files import read_json

pytestmark = pytest.mark.slow

SETTINGS = "{partition: main, nodes: 2, tasks_per_node: 2, time: 60}"
QUICK = [
    "stage1.epochs=1", "stage2.epochs=1", "stage2.cross_fit=0", "evaluate.samples=0", "evaluate.bootstrap=0",
    "tracker=none",
]  # fmt: skip
WITHIN_S = 600
RAISES = """
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "trainer.training.stages":
            raise RuntimeError("made to raise in rank 1")

if (os.environ.get("SLURM_JOB_NAME"), os.environ.get("SLURM_PROCID")) == ("stage1", "1"):
    sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize.py by which one rank of stage 1 raises before it meets the others."""


class Pipeline:
    """Calls of slurm/pipeline.py for one run on the tiny data."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path) -> None:
        self._cluster, self.run = cluster, folder / "run"
        self._slurm = folder / "site.yaml"
        self._slurm.write_text(SETTINGS)
        self._overrides = [f"data.shards={shards}", *QUICK]

    def __call__(self, *arguments: str) -> CompletedProcess[str]:
        config = ["--config", str(ROOT / "configs" / "debug.yaml"), "--slurm", str(self._slurm), "--run", str(self.run)]
        command = [sys.executable, ROOT / "slurm" / "pipeline.py", *config, *self._overrides, *arguments]
        return self._cluster.run(*command, check=False, seconds=WITHIN_S)

    def ids(self) -> dict[str, str]:
        """The submitted jobs by name."""
        return {job.name: job.id for job in queue.read(self.run)}

    def states(self) -> dict[str, str]:
        """The states of the jobs by name."""
        return {name: self._cluster.state(job) for name, job in self.ids().items()}

    def told(self, done: CompletedProcess[str]) -> str:
        """What a person needs who repairs the test."""
        return f"{done.stdout}\n{done.stderr}\n{self._cluster.report(*self.ids().values())}"


@pytest.fixture
def pipeline(cluster: Cluster, tmp_path: Path, tiny_shards: Path) -> Pipeline:
    """The pipeline of a run that does not exist yet."""
    return Pipeline(cluster, tmp_path, tiny_shards)


def test_the_chain_trains_scores_and_reports_in_its_order(pipeline: Pipeline, cluster: Cluster) -> None:
    done = pipeline("--wait")
    assert done.returncode == 0, pipeline.told(done)
    assert set(pipeline.states().values()) == {"COMPLETED"}

    times = {name: cluster.facts(job) for name, job in pipeline.ids().items()}
    began = {name: facts["StartTime"] for name, facts in times.items()}
    ended = {name: facts["EndTime"] for name, facts in times.items()}
    assert list(began) == ["stage1", "evaluate1", "stage2", "evaluate2", "report"]
    assert ended["stage1"] <= began["stage2"] and ended["evaluate2"] <= began["report"]
    assert began["stage1"] <= began["evaluate1"] and began["stage2"] <= began["evaluate2"]

    run = RunDirectory(pipeline.run)
    for number in (1, 2):
        start = read_json(run.stage(number).path / "starts" / "1.json")
        assert (start["world"], start["launcher"], sorted(start["hosts"])) == (4, "srun", ["n1", "n1", "n2", "n2"])
        assert start["slurm"]["SLURM_JOB_ID"] == pipeline.ids()[f"stage{number}"]
        assert {score["set"] for score in run.stage(number).read_scores()} == {"val", "test"}
    assert (pipeline.run / "report.html").exists()
    for job, tasks in (("stage1", 4), ("evaluate2", 1)):
        assert len(list((pipeline.run / "slurm").glob(f"{pipeline.ids()[job]}_*_log.out"))) == tasks

    again = pipeline("stage1.epochs=3")
    assert again.returncode == 0
    assert again.stdout.splitlines() == [
        "stage 1: finished; nothing to do",
        "stage 2: finished; nothing to do",
        "Nothing to submit.",
    ]


def test_when_stage_1_raises_stage_2_never_runs_and_the_cause_is_shown(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(RAISES)
    done = pipeline("--wait", f"slurm.setup=['export PYTHONPATH={tmp_path}']")
    assert done.returncode == 1, pipeline.told(done)
    states = pipeline.states()
    assert (states["stage1"], states["stage2"], states["evaluate2"]) == ("FAILED", "CANCELLED", "CANCELLED")
    assert not (pipeline.run / "stage2").exists()
    assert not list((pipeline.run / "slurm" / pipeline.ids()["stage2"]).glob("**/*.json"))
    lines = done.stdout.splitlines()
    assert "    RuntimeError: made to raise in rank 1" in lines
    assert any(line.startswith("stage1 (job ") and "has failed" in line for line in lines)
    assert any(line.startswith("  the last lines of task 1 of 4 on n1") for line in lines)
    assert lines[-1].startswith("cancelled, as it cannot begin without that: stage2")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("slurm.partition=nope", ["Invalid partition name", "found nope, expected main or urgent", "slurm.partition="]),
        ("slurm.stage2.partition=nope", ["stage2: SLURM says"]),
        ("slurm.nodes=3", ["node configuration is not available", "slurm.nodes="]),
        ("slurm.node=2", ["node: unknown key. Did you mean nodes?"]),
        ("stage1.lrr=1", ["stage1.lrr: unknown key"]),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    pipeline: Pipeline, cluster: Cluster, override: str, parts: list[str]
) -> None:
    before = cluster.squeue()
    done = pipeline(override)
    assert done.returncode == 2, pipeline.told(done)
    assert all(part in done.stderr for part in parts), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(cluster.squeue()) == len(before)
    assert not pipeline.run.exists()


def test_a_dry_run_prints_the_scripts_that_slurm_takes(pipeline: Pipeline, cluster: Cluster, tmp_path: Path) -> None:
    done = pipeline("--dry-run", "slurm.requeue=false", "slurm.max_requeues=2")
    assert done.returncode == 0, pipeline.told(done)
    parts = done.stdout.split("# ===== ")[1:]
    assert [part.split()[0] for part in parts][:3] == ["stage1", "stage1.2", "evaluate1"]
    for number, part in enumerate(parts):
        lines = [line for line in part.splitlines()[1:] if "--dependency" not in line]
        script = tmp_path / f"{number}.sh"
        script.write_text("\n".join(lines))
        cluster.run("sbatch", "--test-only", script)
    assert not pipeline.run.exists()
