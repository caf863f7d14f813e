"""The command line as a person uses it: configs/debug.yaml from shards to scores, interrupted, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trainer.cli import main
from trainer.run import checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(*arguments: str, accelerate: bool = False) -> subprocess.Popen[str]:
    """`python -m trainer ...`, or the same under `accelerate launch`."""
    config = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "-m"] if accelerate else ["-m"]
    command = [sys.executable, *launcher, "trainer", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def weights(stage: Path) -> dict[str, torch.Tensor]:
    step = checkpoint.steps(stage / "checkpoints")[-1]
    return checkpoint.load(checkpoint.folder_of(stage / "checkpoints", step)).model


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_run_directory_holds_all_there_is_to_know(debug_run: Path) -> None:
    for stage in ("stage1", "stage2"):
        files = {str(path.relative_to(debug_run / stage)) for path in (debug_run / stage).rglob("*") if path.is_file()}
        assert {"config.yaml", "starts/1.json", "heartbeat.json", "finished.json", "logs/metrics.jsonl"} <= files
        assert any(name.startswith("checkpoints/step_") and name.endswith("meta.json") for name in files)
        assert any(name.startswith("scores/") for name in files)
        assert not [name for name in files if "/." in name or name.startswith(".")]
        start = json.loads((debug_run / stage / "starts" / "1.json").read_text())
        assert (start["world"], start["hosts"]) == (1, [start["host"]])
    assert {path.name for path in debug_run.glob("*.png")} == {"curves.png", "stage1_r.png", "stage2_r.png"}


def test_a_score_file_says_what_was_scored_and_agrees_with_its_array(debug_run: Path) -> None:
    paths = sorted((debug_run / "stage1" / "scores").glob("*-test-mean.json"))
    score = json.loads(paths[-1].read_text())
    assert (score["stage"], score["set"], score["estimate"]) == (1, "test", "mean")
    assert set(score["per_subject"]) == {"1", "2", "3", "5"}
    r = np.load(paths[-1].with_suffix(".npy"))
    assert r.shape == (4, 20)
    assert score["pearson_r"] == pytest.approx(r.mean(), abs=1e-12)
    assert score["per_subject"]["3"] == pytest.approx(r[2].mean(), abs=1e-12)
    assert score["n_trs"] > 0


def test_stage_2_stands_around_a_copy_of_the_best_anchor(debug_run: Path) -> None:
    step = json.loads((debug_run / "stage1" / "finished.json").read_text())["step"]
    original = checkpoint.load(checkpoint.folder_of(debug_run / "stage1" / "checkpoints", step))
    copy = checkpoint.load(debug_run / "stage2" / "anchor", weights_only=True)
    assert copy.meta["sha256"]["model.safetensors"] == original.meta["sha256"]["model.safetensors"]
    assert {path.name for path in (debug_run / "stage2" / "anchor").glob("fold_*")} == {"fold_1", "fold_2"}


def test_evaluate_gives_the_scores_of_the_training(
    debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(debug_run, run)
    before = {path: json.loads(path.read_text()) for path in run.rglob("scores/*-test-mean.json")}
    assert len(before) == 2
    assert main(["evaluate", str(run), "--set", "test"]) == 0
    printed = capsys.readouterr().out
    assert "Stage 1 Overall Pearson's r: " in printed
    assert "Stage 1 - Sub 5 Mean Pearson's r: " in printed
    assert "Stage 2 Epoch " in printed
    for path, score in before.items():
        after = json.loads(path.read_text())
        assert {key: after[key] for key in score} == score and after["full"]


def test_a_finished_run_is_neither_overwritten_nor_trained_again(
    debug_run: Path, debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", str(debug_config), "--run", str(debug_run), f"data.shards={tiny_shards}"]
    assert "holds another training" in refused(capsys, *arguments)
    before = (debug_run / "stage2" / "finished.json").read_text()
    assert main([*arguments, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "Stage 2 is finished" in out and "--overwrite" not in out
    assert (debug_run / "stage2" / "finished.json").read_text() == before
    message = refused(capsys, *arguments, "--resume", "stage1.lr=0.5", "num_samples=40")
    assert "found other values of num_samples, stage1.lr" in message


def test_more_steps_of_a_finished_stage_are_not_trained_and_it_says_what_to_do(
    debug_config: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = tmp_path / "run" / "stage1"
    arguments = ["train", "--config", str(debug_config), "--run", str(stage.parent), f"data.shards={tiny_shards}"]
    arguments += ["--stage", "1"]
    assert main([*arguments, "stage1.max_steps=4"]) == 0
    for max_steps, said in (
        (4, f"Stage 1 is finished: {stage}"),
        (2, f"Stage 1 is finished: {stage}"),
        (12, f"Stage 1 is finished at step 4, and the configuration now asks for 12: {stage} stays as it is. Give "),
    ):
        capsys.readouterr()
        assert main([*arguments, "--resume", f"stage1.max_steps={max_steps}"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "is finished" in line)
        assert line.startswith(said) and ("--overwrite" in line) == (max_steps == 12)
    assert checkpoint.steps(stage / "checkpoints")[-1] == 4


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("include_features=[whisper/layers.99]", ["whisper/layers.99", "whisper/layers.12"]),
        ("stage2.latent_dim=21", ["stage2.latent_dim", "found 21", "at most 20"]),
        ("datasets.test.filter.films=[chaplim]", ["datasets.test", "Did you mean chaplin?"]),
        ("datasets.test.filter.trs=[500, 600]", ["datasets.test", "no run left"]),
        ("data.shards=nowhere", ["nowhere"]),
        ("datasets.val.filter.seasons=[1]", ["datasets.val", "shares TRs", "with train"]),
        ("stage2.latent_dim=1", ["latent"]),
        ("stage1.lrr=3", ["stage1.lrr", "Did you mean stage1.lr?"]),
    ],
)
def test_what_does_not_fit_the_shards_is_refused_before_anything_is_written(
    override: str,
    parts: list[str],
    tmp_path: Path,
    debug_config: Path,
    tiny_shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shards = f"data.shards={tiny_shards}"
    message = refused(capsys, "train", "--config", str(debug_config), "--run", str(run), shards, override)
    assert all(part in message for part in parts), message
    assert not run.exists()


def test_stage_2_needs_a_finished_stage_1(
    tmp_path: Path, debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    arguments = ["--config", str(debug_config), "--run", run, "--stage", "2", f"data.shards={tiny_shards}"]
    assert "stage1/finished.json: missing. Train stage 1" in refused(capsys, "train", *arguments)
    assert not Path(run).exists()


def test_stage_2_is_not_trained_around_an_anchor_of_another_configuration(
    debug_run: Path, tmp_path: Path, debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(debug_run / "stage1", run / "stage1")
    arguments = ["train", "--config", str(debug_config), "--run", str(run), "--stage", "2"]
    overrides = [f"data.shards={tiny_shards}", "stage1.model.encoder_causal=true", "bold.standardise=run"]
    message = refused(capsys, *arguments, *overrides)
    assert "found other values of bold.standardise, stage1.model.encoder_causal" in message
    assert not (run / "stage2").exists()


@pytest.mark.parametrize("subjects", ["[1,2,3]", "null"])
def test_stage_2_learns_from_no_subject_that_the_anchor_does_not_know(
    debug_run: Path,
    tmp_path: Path,
    debug_config: Path,
    tiny_shards: Path,
    capsys: pytest.CaptureFixture[str],
    subjects: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(debug_run / "stage1", run / "stage1")
    config = yaml.safe_load((run / "stage1" / "config.yaml").read_text())
    config["datasets"]["train"]["filter"]["subjects"] = ["1", "2"]
    (run / "stage1" / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", "--config", str(debug_config), "--run", str(run), "--stage", "2"]
    overrides = [f"data.shards={tiny_shards}", f"datasets.train.filter.subjects={subjects}"]
    message = refused(capsys, *arguments, *overrides)
    assert "found other values of datasets.train.filter.subjects" in message


def test_a_refit_is_trained_on_both_sets_and_scored_on_neither(
    tmp_path: Path, debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["train.refit=true", "stage2.subjects=separate", "stage2.cross_fit=0", "bold.standardise=subject"]
    options += ["stage1.clip_grad_norm=1.0", "data.num_workers=1", "stage2.parametrisation=velocity"]
    arguments = ["--config", str(debug_config), "--run", str(run), f"data.shards={tiny_shards}", *options]
    assert main(["train", *arguments]) == 0
    step = json.loads((run / "stage1" / "finished.json").read_text())["step"]
    for stage in ("stage1", "stage2"):
        chosen = json.loads((run / stage / "finished.json").read_text())["step"]
        assert checkpoint.steps(run / stage / "refit" / "checkpoints")[-1] == chosen
        sets = {json.loads(path.read_text())["set"] for path in (run / stage / "refit" / "scores").glob("*.json")}
        assert sets == {"test"}
    anchor = checkpoint.load(run / "stage2" / "refit" / "anchor", weights_only=True)
    refitted = checkpoint.load(checkpoint.folder_of(run / "stage1" / "refit" / "checkpoints", step))
    assert anchor.meta["sha256"]["model.safetensors"] == refitted.meta["sha256"]["model.safetensors"]
    means = [
        checkpoint.load(checkpoint.folder_of(folder / "checkpoints", step)).model["streams.0.mean"]
        for folder in (run / "stage1", run / "stage1" / "refit")
    ]
    assert not torch.equal(*means), "the refit standardises with its own training set"
    capsys.readouterr()
    assert main(["evaluate", str(run), "--stage", "1"]) == 0
    assert "-- test, mean" in capsys.readouterr().out
    assert "the refitted model was trained on val" in refused(capsys, "evaluate", str(run), "--set", "val")


def test_the_published_projection_trains_and_a_collapse_is_named(
    tmp_path: Path, debug_run: Path, debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(debug_run / "stage1", run / "stage1")
    options = ["stage2.projection=linear", "stage2.parametrisation=velocity", "stage2.lr=0.01"]
    arguments = ["--config", str(debug_config), "--run", str(run), "--stage", "2", f"data.shards={tiny_shards}"]
    assert main(["train", *arguments, *options]) == 0
    assert "the projection collapses" in capsys.readouterr().err
    scores = [json.loads(path.read_text()) for path in (run / "stage2" / "scores").glob("*-val-mean.json")]
    assert len(scores) == 2
    assert not any("flow_loss" in score for score in scores)
    lines = [json.loads(line) for line in (run / "stage2" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["latent_std"][0] < 0.5 for line in lines if line["kind"] == "val")


def test_evaluate_names_what_there_is(debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no training" in refused(capsys, "evaluate", str(tmp_path))
    assert "one of train, val, test" in refused(capsys, "evaluate", str(debug_run), "--set", "tset")
    assert "found 7, expected best, last, all or one of" in refused(capsys, "evaluate", str(debug_run), "--step", "7")


def test_shards_with_other_parcels_than_the_checkpoint_are_refused(
    debug_run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = tmp_path / "run" / "stage1"
    source = debug_run / "stage1"
    step = checkpoint.steps(source / "checkpoints")[-1]
    found = checkpoint.load(checkpoint.folder_of(source / "checkpoints", step))
    found.meta["shapes"]["n_parcels"] = 1000
    checkpoint.save(stage / "checkpoints", step, found)
    (stage / "config.yaml").write_text((source / "config.yaml").read_text())
    message = refused(capsys, "evaluate", str(stage.parent))
    assert "n_parcels do not fit" in message
    assert "found 1000 in the checkpoint, expected 20" in message


def test_accelerate_launch_trains_the_same_weights(
    debug_run: Path, debug_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "launched"
    process = launch(
        *["train", "--config", str(debug_config), "--run", str(run), "--stage", "1", f"data.shards={tiny_shards}"],
        accelerate=True,
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Stage 1 Overall Pearson's r: " in output
    expected = weights(debug_run / "stage1")
    for name, tensor in weights(run / "stage1").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_ctrl_c_and_resume_give_the_weights_of_an_uninterrupted_run(
    debug_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = ["train", "--config", str(debug_config), "--stage", "1", f"data.shards={tiny_shards}"]
    arguments += ["stage1.epochs=30", "checkpoint.every_steps=1000"]
    assert launch(*arguments, "--run", str(whole)).wait(timeout=300) == 0

    process = launch(*arguments, "--run", str(part))
    deadline = time.monotonic() + 120
    while not (part / "stage1" / "logs" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "SIGINT at step" in output
    assert "Continue with --resume." in output
    assert not (part / "stage1" / "finished.json").exists()

    process = launch(*arguments, "--run", str(part), "--resume")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    expected = weights(whole / "stage1")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(part / "stage1").items())
    assert sorted(path.name for path in (part / "stage1" / "starts").iterdir()) == ["1.json", "2.json"]


@pytest.mark.slow
def test_where_the_data_stand_and_who_reads_them_changes_no_weight(
    debug_run: Path, debug_config: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = weights(debug_run / "stage1"), weights(debug_run / "stage2")
    for i, options in enumerate((["data.residence=device"], ["data.residence=disk", "data.num_workers=2"])):
        run = tmp_path / str(i)
        remote = f"data.shards=pipe:cat {tiny_shards}" if i else f"data.shards={tiny_shards}"
        cached = f"data.cache_dir={tmp_path / 'cache'}"
        assert main(["train", "--config", str(debug_config), "--run", str(run), remote, cached, *options]) == 0
        assert f"{options[0].replace('=', ': ')} (" in capsys.readouterr().out
        for stage, before in zip(("stage1", "stage2"), expected, strict=True):
            assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run / stage).items())


def test_context_changes_training_and_scores_and_still_resumes(
    debug_run: Path, debug_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--config", str(debug_config), f"data.shards={tiny_shards}", "data.context_trs=2"]
    assert main([*arguments, "--run", str(tmp_path / "c")]) == 0
    before = weights(debug_run / "stage1")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "c" / "stage1").items())
    scores = [json.loads(path.read_text()) for path in (tmp_path / "c").rglob("scores/*-test-mean.json")]
    expected = [json.loads(path.read_text()) for path in debug_run.rglob("scores/*-test-mean.json")]
    assert len(scores) == 2 and {s["n_trs"] for s in scores} == {s["n_trs"] for s in expected}


@pytest.mark.slow
def test_kills_at_any_moment_cost_no_bit(debug_config: Path, tiny_shards: Path, tmp_path: Path) -> None:
    options = ["stage1.max_steps=120", "stage1.epochs=99", "checkpoint.every_steps=2", "log_every=1", "tracker=none"]
    arguments = ["train", "--config", str(debug_config), "--stage", "1", f"data.shards={tiny_shards}", *options]
    assert main([*arguments, "--run", str(tmp_path / "whole")]) == 0
    run = tmp_path / "part"
    log = run / "stage1" / "logs" / "metrics.jsonl"
    for target in (17, 58, 101):
        process = launch(*arguments, "--run", str(run), "--resume")
        deadline = time.monotonic() + 120
        while not (log.exists() and f'"step": {target},' in log.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        time.sleep(0.0007 * target)  # before, while and after a checkpoint is written
        process.kill()
        process.communicate(timeout=60)
    assert main([*arguments, "--run", str(run), "--resume"]) == 0
    expected = weights(tmp_path / "whole" / "stage1")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run / "stage1").items())
    assert len(list((run / "stage1" / "starts").iterdir())) == 4
    assert not list((run / "stage1" / "checkpoints").glob(".*"))


def test_a_second_training_of_a_run_is_refused_and_status_shows_the_first(
    debug_config: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--config", str(debug_config), "--run", str(run), f"data.shards={tiny_shards}"]
    process = launch(*arguments, "stage1.epochs=100000")
    try:
        deadline = time.monotonic() + 120
        while not (run / "stage1" / "heartbeat.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        message = refused(capsys, *arguments, "stage1.epochs=100000", "--resume")
        assert f"process {process.pid} on" in message and "python -m trainer status" in message
        assert "process" in refused(capsys, *arguments, "--overwrite")
        assert main(["status", str(run)]) == 0
        shown = capsys.readouterr().out
        assert "running" in shown and str(process.pid) in shown and "waiting" in shown
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, output
        assert main(["status", str(run)]) == 0
        assert "interrupted" in capsys.readouterr().out
    finally:
        process.kill()
