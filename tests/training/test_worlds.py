"""One process or several, DDP or ZeRO, whole or in micro-batches: the same losses, step by step, and across resumes.

Dropout is on in both stages, and the tiny data lack runs of single subjects, so the ranks hold unequal numbers of them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.trainings import run as run_here
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50
OPTIONS = [
    "log_every=1", "batch_size=8", "num_samples=80", "checkpoint.every_steps=null", "tracker=none",
    "deterministic=true", f"stage1.max_steps={STEPS}", "stage1.epochs=100", "stage1.model.hidden_model=transformer",
    "stage1.model.transformer={num_heads: 2, depth: 1}", "stage1.model.dropout=0.2", "stage1.clip_grad_norm=0.05",
    f"stage2.max_steps={STEPS}", "stage2.epochs=100", "stage2.decoder.dropout=0.2", "stage2.cross_fit=0",
    "stage2.snapshot_every_epochs=100", "stage2.ema=0.9",
]  # fmt: skip
STAGE_1 = ["--stage", "1"]


def a_training(
    folder: Path, shards: Path, name: str, *more: str, zero: int | None = None, stop_at: int | None = None
) -> dict[str, object]:
    """One entry of the list that tests/trainings.py reads."""
    config, run = str(ROOT / "configs" / "debug.yaml"), str(folder / name)
    arguments = ["train", "--config", config, "--run", run, f"data.shards={shards}", *OPTIONS, *more]
    return {"arguments": arguments, "zero": zero, "stop_at": stop_at}


def launch(world: int, trainings: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "tests.trainings", str(trainings)]
    done = subprocess.run(
        [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(stage: StageDirectory) -> list[float]:
    lines = [line for line in stage.read_metrics() if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def agree(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, wide_config: Path) -> Path:
    """A folder with all runs: one process is this one, two are one launch."""
    folder = tmp_path_factory.mktemp("worlds")

    training = partial(a_training, folder, tiny_shards)

    def wide(name: str) -> dict[str, object]:
        arguments = ["train", "--config", str(wide_config), "--run", str(folder / name)]
        return {"arguments": arguments, "zero": None, "stop_at": None}

    in_two, resume = "gradient_accumulation_steps=2", ("--resume", *STAGE_1)
    alone = [wide("wide_one"), training("one"), training("one_in_two", in_two)]
    alone += [
        training("one_twice", *STAGE_1, stop_at=23),
        training("one_twice", *resume),
        training("one_to_ddp", *STAGE_1, stop_at=23),
    ]
    with_ddp = [
        wide("wide_ddp"),
        training("ddp"),
        training("ddp_in_two", in_two),
        training("ddp_twice", *STAGE_1, stop_at=23),
        training("ddp_twice", *resume),
        training("one_to_ddp", *resume),
        training("ddp_to_zero2", *STAGE_1, stop_at=23),
    ]
    with_zero = [
        training("zero1", zero=1),
        training("zero2", zero=2),
        training("zero2_in_two", in_two, zero=2),
        training("ddp_to_zero2", *resume, zero=2),
        training("zero2_to_one", *STAGE_1, zero=2, stop_at=23),
    ]
    (folder / "before.json").write_text(json.dumps(alone))
    (folder / "pairs.json").write_text(json.dumps(with_ddp + with_zero))
    (folder / "after.json").write_text(json.dumps([training("zero2_to_one", *resume)]))
    assert run_here(folder / "before.json") == 0
    launch(2, folder / "pairs.json")
    assert run_here(folder / "after.json") == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("other", ["one_in_two", "ddp", "ddp_in_two", "zero1", "zero2", "zero2_in_two"])
def test_losses_scores_and_weights_do_not_depend_on_who_computes(runs: Path, other: str) -> None:
    worlds = {"one": 1, "one_in_two": 1}
    for number in (1, 2):
        one, two = (RunDirectory(runs / name).stage(number) for name in ("one", other))
        start = json.loads((two.path / "starts" / "1.json").read_text())
        assert start["world"] == worlds.get(other, 2) and start["hosts"] == [start["host"]] * start["world"]
        assert len(losses(one)) == STEPS
        assert agree(losses(one), losses(two)), (number, losses(one), losses(two))
        r = [[s["pearson_r"] for s in stage.read_scores()] for stage in (one, two)]
        assert r[0] == pytest.approx(r[1], abs=1e-4)
        folders = [checkpoint.folder_of(stage.checkpoints, STEPS) for stage in (one, two)]
        first, second = (checkpoint.load(folder) for folder in folders)
        assert first.model.keys() == second.model.keys() and first.moments.keys() == second.moments.keys()
        assert bool(first.ema) == bool(second.ema) == (number == 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_to_ddp", "ddp_to_zero2", "zero2_to_one"])
def test_a_run_goes_on_on_another_number_of_processes_and_under_another_launcher(runs: Path, name: str) -> None:
    whole, resumed = (RunDirectory(runs / folder).stage(1) for folder in ("one", name))
    assert len(list((resumed.path / "starts").iterdir())) == 2
    assert agree(losses(whole), losses(resumed))


@pytest.mark.slow
def test_the_latent_of_many_parcels_does_not_depend_on_who_searches_for_it(runs: Path) -> None:
    stages = [RunDirectory(runs / name).stage(2) for name in ("wide_one", "wide_ddp")]
    one, two = (checkpoint.load(checkpoint.folder_of(stage.checkpoints, 2)).model for stage in stages)
    for name in ("mean", "basis", "scale", "residual_std"):
        assert torch.allclose(one[f"latent.{name}"], two[f"latent.{name}"], rtol=1e-6, atol=1e-6), name
    assert agree(*(losses(stage) for stage in stages))
    assert all(stage.finished() for stage in stages)


@pytest.mark.slow
def test_two_ranks_write_each_line_and_score_once(runs: Path) -> None:
    for name in ("ddp", "zero2"):
        stage = RunDirectory(runs / name).stage(1)
        lines = [json.loads(line) for line in stage.metrics.read_text().splitlines()]
        keys = [(line["kind"], line["step"]) for line in lines]
        assert len(keys) == len(set(keys)) > STEPS
        weights = checkpoint.load(checkpoint.folder_of(stage.checkpoints, STEPS)).model
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def same_bits(one: StageDirectory, other: StageDirectory) -> bool:
    first, second = (checkpoint.load(checkpoint.folder_of(stage.checkpoints, STEPS)) for stage in (one, other))
    pairs = [(first.model, second.model), (first.moments, second.moments)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "twice"), [("one", "one_twice"), ("ddp", "ddp_twice")])
def test_deterministic_resumes_repeat_every_bit(runs: Path, whole: str, twice: str) -> None:
    assert same_bits(RunDirectory(runs / whole).stage(1), RunDirectory(runs / twice).stage(1))


@pytest.mark.slow
def test_deterministic_resumes_repeat_every_bit_on_4_ranks(tmp_path: Path, tiny_shards: Path) -> None:
    training = partial(a_training, tmp_path, tiny_shards)
    trainings = [
        training("whole", *STAGE_1),
        training("twice", *STAGE_1, stop_at=23),
        training("twice", "--resume", *STAGE_1),
    ]
    (tmp_path / "list.json").write_text(json.dumps(trainings))
    launch(4, tmp_path / "list.json")
    assert same_bits(RunDirectory(tmp_path / "whole").stage(1), RunDirectory(tmp_path / "twice").stage(1))
