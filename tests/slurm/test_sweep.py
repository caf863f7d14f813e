"""Runs as job arrays on a real cluster: a sweep behind a job that makes its shards, one stage 2 a subject."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.slurm.lab import ROOT, Cluster
from tests.slurm.test_pipeline import QUICK, WITHIN_S
from trainer.run import jobs as queue
from trainer.run.directory import RunDirectory
from trainer.run.files import read_json

pytestmark = pytest.mark.slow

RUNS = ["seed=1", "seed=2"]


def submit(cluster: Cluster, slurm: Path, run: Path, *arguments: str) -> CompletedProcess[str]:
    """Submit runs of configs/debug.yaml, and wait until all their jobs are over."""
    config = ["--config", str(ROOT / "configs" / "debug.yaml"), "--slurm", str(slurm), "--run", str(run), "--wait"]
    command = [sys.executable, ROOT / "slurm" / "pipeline.py", *config, *QUICK, *arguments]
    return cluster.run(*command, check=False, seconds=WITHIN_S)


def test_a_sweep_makes_its_shards_and_trains_its_runs_with_the_code_that_was_submitted(
    cluster: Cluster, tmp_path: Path, tiny_source: Path
) -> None:
    layout = ROOT / "configs" / "datasets" / "algonauts2025.yaml"
    shards = f"{{layout: {layout}, root: {tiny_source}, nodes: 2, tasks_per_node: 1}}"
    (tmp_path / "site.yaml").write_text(f"{{partition: main, time: 60, shards: {shards}}}")
    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2]}")
    home = tmp_path / "sweep"
    options = ["--array", str(tmp_path / "sweep.yaml"), "--snapshot", f"data.shards={tmp_path / 'shards'}"]
    done = submit(cluster, tmp_path / "site.yaml", home, *options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{cluster.report(*_ids(home, home / RUNS[0]))}"

    for number, name in enumerate(RUNS):
        run = RunDirectory(home / name)
        jobs = {job.name: job.id for job in queue.read(run.path)}
        assert jobs["stage1"].endswith(f"_{number}") and jobs["stage2"].endswith(f"_{number}")
        assert all(run.stage(stage).finished() for stage in (1, 2))
        start = read_json(run.stage(2).path / "starts" / "1.json")
        assert start["slurm"]["SLURM_ARRAY_TASK_ID"] == str(number)
        assert start["code_sha256"] == read_json(home / "code" / "snapshot.json")["sha256"]
    rows = list(csv.reader((home / "scores.csv").read_text().splitlines()))
    assert [row[:2] for row in rows[1:]] == [["seed=1", "1"], ["seed=2", "2"]]
    assert all(name in (home / "report.html").read_text() for name in RUNS)


def test_stage_2_of_each_subject_is_an_element_behind_the_stage_1_of_all(
    cluster: Cluster, tmp_path: Path, tiny_shards: Path
) -> None:
    (tmp_path / "site.yaml").write_text("{partition: main, time: 60}")
    home = tmp_path / "run"
    two = [f"datasets.{name}.filter.subjects=[1,3]" for name in ("train", "val", "test")]
    options = ["stage2.subjects=separate", f"data.shards={tiny_shards}", *two]
    done = submit(cluster, tmp_path / "site.yaml", home, *options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{cluster.report(*_ids(home, home / 'subject_1'))}"

    assert len(list((home / "stage1" / "starts").glob("*.json"))) == 1
    for label in ("1", "3"):
        stage = RunDirectory(home / f"subject_{label}").stage(2)
        assert stage.finished() is not None
        assert {tuple(score["per_subject"]) for score in stage.read_scores()} == {(label,)}
    assert [row[0] for row in csv.reader((home / "scores.csv").read_text().splitlines())][1:] == [
        "subject_1",
        "subject_3",
    ]


def _ids(*runs: Path) -> list[str]:
    return list(dict.fromkeys(job.id for run in runs for job in queue.read(run)))
