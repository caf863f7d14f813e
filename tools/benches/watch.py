"""Workers: how soon a checkpoint that appears is scored, and what a poll costs where nothing is new."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tools.benches import ROOT, Row, data, in_turns, seconds
from trainer.data.study import Study
from trainer.evaluation.worker import Worker
from trainer.models.build import build_anchor
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.files import write_json, write_whole
from trainer.run.signals import StopRequest
from trainer.scoring.predictor import shapes_of
from trainer.scoring.score import score_checkpoint
from trainer.scoring.shares import OneProcess
from trainer.stored import load_stored

CHECKPOINTS = 100
APPEARANCES = 5
POLLS = 50
PATIENCE_S = 600.0


def measure(scratch: Path) -> list[Row]:
    """All rows; about 4 GB of scratch and 5 minutes on two cores."""
    run = make_run(scratch)
    return [*latency_rows(run), *poll_rows(run)]


def make_run(scratch: Path) -> RunDirectory:
    """A run of stage 1 at the published widths, one checkpoint of weights as drawn, and a set of 10 runs."""
    streams = ", ".join(f"s{i}/x" for i in range(len(data.WIDTHS)))
    text = f"""
data: {{shards: {data.make_data(scratch)}}}
include_features: [{streams}]
datasets:
  train: {{filter: {{runs: [run10], trs: [0, 64]}}}}
  val: {{filter: {{runs: [run11], trs: [0, 64]}}}}
  test: {{filter: {{runs: ['run0*']}}}}
val_set_name: val
"""
    run = RunDirectory(scratch / "run")
    stage = run.stage(1)
    write_whole(stage.config, text)
    study = Study(load_stored(stage.config))
    assert len(study.spans["test"]) == 10
    anchor = build_anchor(study.config.stage1.model, shapes_of(study))
    meta = {"shapes": shapes_of(study).as_json(), "steps_per_epoch": 1}
    checkpoint.save(stage.checkpoints, 1, checkpoint.Checkpoint(anchor.state_dict(), {}, meta))
    return run


def latency_rows(run: RunDirectory) -> list[Row]:
    """From the rename that makes a checkpoint appear to its last score file, beside what the scoring alone takes."""
    stage = run.stage(1)
    study = Study(load_stored(stage.config))
    alone = StageDirectory(run.path / "alone")
    shutil.copytree(stage.checkpoints, alone.checkpoints)
    ranks = OneProcess(torch.device("cpu"))

    def score() -> float:
        return seconds(lambda: score_checkpoint(alone, 1, 1, study, ["test"], ranks, lambda _: None, full=True))

    command = [sys.executable, "-m", "trainer", "watch", str(run.path), "--set", "test"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for_scores(stage, 1)  # the worker has started
        steps = iter(range(2, 10**6))
        medians = in_turns({"watch": lambda: appear(stage, next(steps)), "alone": score}, APPEARANCES)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
    shutil.rmtree(alone.path)
    overhead = medians["watch"] - medians["alone"]
    return [
        Row("from a checkpoint's appearance to its scores on 10 runs", medians["watch"], "s", medians["alone"],
            medians["watch"] / medians["alone"]),
        Row("  of it, what is not scoring", overhead, "s", goal="< 5 s", met=overhead < 5),
    ]  # fmt: skip


def appear(stage: StageDirectory, step: int) -> float:
    """Let a checkpoint appear; returns after how many seconds it is scored."""
    add_checkpoint(stage, step)
    return seconds(lambda: wait_for_scores(stage, step))


def add_checkpoint(stage: StageDirectory, step: int) -> None:
    """Another checkpoint of the same weights, which are linked."""
    aside, source = stage.checkpoints / ".aside", checkpoint.folder_of(stage.checkpoints, 1)
    shutil.copytree(source, aside, copy_function=_linked, ignore=shutil.ignore_patterns("meta.json"))
    meta = json.loads((source / "meta.json").read_text())
    (aside / "meta.json").write_text(json.dumps({**meta, "step": step}))
    aside.rename(checkpoint.folder_of(stage.checkpoints, step))


def _linked(source: str, target: str) -> None:
    """Link a file, or copy it where the scratch folder's file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def wait_for_scores(stage: StageDirectory, step: int) -> None:
    """Wait for the last file of a step's scores."""
    path, deadline = stage.scores / f"step_{step:08d}-test-mean.json", time.monotonic() + PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} did not appear within {PATIENCE_S:g} s")
        time.sleep(0.01)


def poll_rows(run: RunDirectory) -> list[Row]:
    """A poll of a run with 100 checkpoints, all scored, beside os.listdir of the folders that it looks at."""
    stage = run.stage(1)
    for step in range(1, CHECKPOINTS + 1):
        if not checkpoint.folder_of(stage.checkpoints, step).exists():
            add_checkpoint(stage, step)
        stem = stage.scores / f"step_{step:08d}-test-mean"
        write_json(stem.with_suffix(".json"), {"step": step, "set": "test", "estimate": "mean", "full": True})
        for name in (f"{stem}.npy", f"{stem}-bootstrap.npy", f"{stem.parent / stem.name[:18]}-series.npz"):
            Path(name).touch()
    worker = Worker(run, ["test"], OneProcess(torch.device("cpu")), StopRequest(), until_finished=True)
    assert worker.turn() is None
    folders = [stage.checkpoints, stage.scores, stage.claims]

    def poll() -> float:
        return 1e3 * statistics.median(seconds(worker.turn) for _ in range(POLLS))

    def listing() -> float:
        return 1e3 * statistics.median(seconds(lambda: [os.listdir(f) for f in folders]) for _ in range(POLLS))  # noqa: PTH208

    medians = in_turns({"poll": poll, "listing": listing}, 9)
    ratio = medians["poll"] / medians["listing"]
    return [
        Row(f"a poll of {CHECKPOINTS} scored checkpoints, against os.listdir", medians["poll"], "ms",
            medians["listing"], ratio, goal="ratio <= 3", met=ratio <= 3),
    ]  # fmt: skip
