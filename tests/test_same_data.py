"""A run knows its data: what it was trained and validated on must be the same in the shards, what was added is free."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.lab import Lab, train
from trainer.cli import main
from trainer.cluster.sweep import table
from trainer.data.manifest import Manifest
from trainer.evaluation.results import read_results
from trainer.evaluation.tables import data_table, difference_table
from trainer.evaluation.worker import Worker
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory
from trainer.run.processes import StopRequest
from trainer.scoring.shares import OneProcess


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a lab with a finished run of both stages; tests must not write into it."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.build()
    assert main(train(lab, lab.folder / "run")) == 0
    return lab.folder


@pytest.fixture
def lab(trained: Path, tmp_path: Path) -> Lab:
    """A lab of one's own with that run, which finds its shards here."""
    shutil.copytree(trained, tmp_path / "lab", ignore=shutil.ignore_patterns("*.png"))
    for path in (tmp_path / "lab" / "run").glob("stage*/config.yaml"):
        path.write_text(path.read_text().replace(str(trained), str(tmp_path / "lab")))
    return Lab(tmp_path / "lab")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def warned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The warnings of a command that does what it is asked to."""
    capsys.readouterr()
    assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("warning: "))


def record(stage: Path) -> dict[str, Any]:
    """What a stage has written down of its data."""
    content: dict[str, Any] = json.loads((stage / "data.json").read_text())
    return content


def change(lab: Lab, *what: tuple[str, str]) -> None:
    """Measure scans or features again, and build."""
    lab.again |= dict.fromkeys(what, 1)
    lab.build()


def undo_stage2(run: Path) -> None:
    """Make of a finished stage 2 one that was interrupted at its first checkpoint."""
    (run / "stage2" / "finished.json").unlink()
    for step in checkpoint.steps(run / "stage2" / "checkpoints")[1:]:
        shutil.rmtree(checkpoint.folder_of(run / "stage2" / "checkpoints", step))


COMMANDS: dict[str, Callable[[Lab, Path], list[str]]] = {
    "resume": lambda lab, run: train(lab, run, "--resume"),
    "stage 2": lambda lab, run: train(lab, run, "--stage", "2", "--overwrite"),
    "evaluate": lambda lab, run: ["evaluate", str(run)],
    "evaluate one stage": lambda lab, run: ["evaluate", str(run), "--stage", "2", "--set", "test"],
    "watch": lambda lab, run: ["watch", str(run), "--until-finished"],
    "predict": lambda lab, run: ["predict", str(run), "--set", "test", "--out", str(lab.folder / "out.h5")],
    "ensemble": lambda lab, run: ["ensemble", str(run), "--set", "test", "--choose-on", "val"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_data_are_refused_by_everyone_who_opens_shards(
    lab: Lab, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(lab, ("2", "a1"))
    run = lab.folder / "run"
    before = sorted(path for path in run.rglob("*") if path.suffix != ".png")
    line = refused(capsys, *COMMANDS[command](lab, run))
    assert "s/a1: other BOLD of subject 2" in line
    assert "run/stage" in line and "trained and validated on" in line
    if command != "stage 2":
        assert sorted(path for path in run.rglob("*") if path.suffix != ".png") == before


def test_a_stage_1_alone_and_a_copied_anchor_are_compared(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    run = lab.folder / "run"
    change(lab, ("1", "b1"))
    shutil.move(run / "stage2", lab.folder / "stage2")
    assert "run/stage1 was" in refused(capsys, *train(lab, run, "--stage", "2"))
    assert not (run / "stage2").exists()
    shutil.move(lab.folder / "stage2", run / "stage2")
    (run / "stage2" / "data.json").unlink()
    assert "stage2/anchor was" in refused(capsys, "evaluate", str(run), "--stage", "2")


CHANGES: dict[str, tuple[Callable[[Lab], object], list[str]]] = {
    "BOLD": (lambda lab: lab.again.update({("1", "b1"): 1}), ["s/b1: other BOLD of subject 1."]),
    "features": (lambda lab: lab.again.update({("m2", "a2"): 1}), ["s/a2: other m2/layer."]),
    "both": (
        lambda lab: lab.again.update({("2", "a2"): 1, ("m1", "a2"): 1}),
        ["s/a2: other BOLD of subject 2, other m1/layer."],
    ),
    "length": (lambda lab: lab.runs.update(a1=44), ["s/a1: 44 TRs instead of 40."]),
    "a run less": (lambda lab: lab.runs.pop("a2"), ["s/a2: missing."]),
    "a person less": (lambda lab: lab.subjects.remove("1"), ["no subject 1;"]),
    "another label": (lambda lab: setattr(lab, "subjects", ["1", "two"]), ["no subject 2;"]),
    "parcels": (lambda lab: setattr(lab, "parcels", 13), ["13 parcels instead of 12;"]),
    "width": (
        lambda lab: lab.widths.update(m1=7),
        ["m1/layer: 7 values (float16) instead of 6 values (float16);"],
    ),
    "many": (
        lambda lab: [lab.again.update({("1", run): 1}) for run in ("a1", "a2", "b1", "c1")] + [lab.runs.update(d=9)],
        ["s/a1: other BOLD of subject 1; s/a2: other BOLD of subject 1; s/b1: other BOLD of subject 1."],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_difference_is_named(lab: Lab, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    do, words = CHANGES[what]
    do(lab)
    lab.build()
    line = refused(capsys, "evaluate", str(lab.folder / "run"))
    assert all(word in line for word in words), line


def test_streams_that_are_stored_otherwise_are_named(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.build("--float32", "m1/layer")
    line = refused(capsys, "evaluate", str(lab.folder / "run"))
    assert "m1/layer: 6 values (float32) instead of 6 values (float16)" in line
    lab.widths.pop("m1")
    lab.build()
    assert "no stream m1/layer" in refused(capsys, "evaluate", str(lab.folder / "run"))


def more(lab: Lab) -> None:
    """Add what the run does not use: people before and behind, runs for each filter, a stream; rename it."""
    lab.subjects = ["0", "2", "1", "9"]
    lab.runs = {"a0": 30, **lab.runs, "a3": 25, "b0": 20, "d1": 30}
    lab.widths = {"m0": 3, **lab.widths}
    lab.name, lab.tr = "renamed", 1.5
    lab.build()


def test_what_is_added_changes_no_score_and_no_prediction(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    run = lab.folder / "run"
    ask = ["predict", str(run), "--set", "test", "--estimate", "sample", "--samples", "2", "--out"]
    for name in ("before", "after"):
        if name == "after":
            shutil.rmtree(run / "ceilings")
            shutil.copytree(run, lab.folder / "scored")
            more(lab)
        warnings = warned(capsys, "evaluate", str(run))
        assert main([*ask, str(lab.folder / f"{name}.h5")]) == 0
    for expected in (lab.folder / "scored").glob("stage?/scores/*"):
        found = run / expected.relative_to(lab.folder / "scored")
        if expected.suffix == ".npy":
            np.testing.assert_array_equal(np.load(found), np.load(expected), err_msg=str(found))
        if expected.suffix == ".json":
            assert json.loads(found.read_text()) == json.loads(expected.read_text()), found
    with h5py.File(lab.folder / "before.h5") as before, h5py.File(lab.folder / "after.h5") as after:
        assert list(before) == list(after) == ["1", "2"]
        for label in before:
            np.testing.assert_array_equal(before[label]["s_c1"][:], after[label]["s_c1"][:])
    assert "datasets.train: its filter fits s_a0, s_a3 too" in warnings
    assert "datasets.val: its filter fits s_b0 too" in warnings


def test_a_resume_after_something_was_added_ends_at_the_same_weights(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab.folder / "run"
    shutil.copytree(run, lab.folder / "whole")
    undo_stage2(run)
    shutil.rmtree(run / "stage2" / "anchor" / "predictions")
    more(lab)
    assert "s_a0, s_a3 too" in warned(capsys, *train(lab, run, "--resume"))
    for name in ("checkpoints/step_00000008", "anchor"):
        found = checkpoint.load(run / "stage2" / name, weights_only=True).model
        expected = checkpoint.load(lab.folder / "whole" / "stage2" / name, weights_only=True).model
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    # the shards are the run's own from now on
    assert record(run / "stage2")["manifest"] == Manifest.read(lab.shards).digest


def test_a_stage_2_stands_on_the_runs_of_its_stage_1(lab: Lab) -> None:
    run = lab.folder / "run"
    shutil.copytree(run, lab.folder / "whole")
    more(lab)
    assert main(train(lab, run, "--stage", "2", "--overwrite")) == 0
    found, expected = (
        json.loads((folder / "stage2" / "data.json").read_text()) for folder in (run, lab.folder / "whole")
    )
    for key in ("subjects", "showings", "sets", "streams"):
        assert found[key] == expected[key]
    weights = [
        checkpoint.load(checkpoint.folder_of(folder / "stage2" / "checkpoints", 8)).model
        for folder in (run, lab.folder / "whole")
    ]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_a_set_can_still_be_defined_anew_for_a_prediction(lab: Lab) -> None:
    more(lab)
    out = lab.folder / "out.h5"
    arguments = ["predict", str(lab.folder / "run"), "--set", "val", "--out", str(out), "datasets.val.filter.runs=[d1]"]
    assert main(arguments) == 0
    with h5py.File(out) as file:
        assert list(file["1"]) == ["s_d1"]


def test_people_that_the_model_does_not_know_are_named(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    more(lab)
    arguments = ["predict", str(lab.folder / "run"), "--set", "test", "--out", str(lab.folder / "out.h5")]
    line = refused(capsys, *arguments, "datasets.test.filter.subjects=['9']")
    assert "datasets.test" in line and "filter.subjects" in line and "found 9, expected among 1, 2" in line
    assert "not known to the model" in line


def scores(run: Path, set_name: str) -> dict[tuple[str, int, str], dict[str, str]]:
    """(stage, step, estimate) -> the digest of what was scored."""
    found = {}
    for path in run.glob(f"stage*/scores/*-{set_name}-*.json"):
        content = json.loads(path.read_text())
        if "estimate" in content:
            found[path.parts[-3], content["step"], content["estimate"]] = content["data"]
    return found


def test_scores_on_other_data_of_a_set_that_is_only_scored_are_seen(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab.folder / "run"
    assert main(["evaluate", str(run), "--step", "all"]) == 0
    before = scores(run, "test")
    assert len({data["bold"] for data in before.values()}) == 1
    change(lab, ("1", "c1"))
    step = json.loads((run / "stage1" / "finished.json").read_text())["step"]
    warnings = warned(capsys, "evaluate", str(run), "--stage", "1", "--step", str(step), "--set", "test")
    others = sorted({s for stage, s, _ in before if stage == "stage1"} - {step})
    assert f"test held other data when step {', '.join(map(str, others))} was scored" in warnings
    results = read_results(run)
    assert any("test held other data when step" in note for note in results.notes)
    rows = [row for rows in difference_table({"run": results}).groups.values() for row in rows]
    assert ["Stage 2, mean − stage 1", "–", "other BOLD"] in rows
    assert "was taken on other data" in refused(capsys, "ensemble", str(run), "--set", "val", "--choose-on", "test")


def test_a_worker_scores_again_what_was_scored_on_other_data(lab: Lab) -> None:
    run = RunDirectory(lab.folder / "run")
    assert main(["watch", str(run.path), "--until-finished"]) == 0
    before = scores(run.path, "test")
    with StopRequest() as stop:
        worker = Worker(run, None, OneProcess(torch.device("cpu")), stop, until_finished=True)
        assert worker.turn() == 0, "all is scored"
        lab.again["2", "c1"] = 1
        lab.build()
        while not isinstance(turn := worker.turn(), int):
            if turn is not None:
                assert turn.unit.set_name == "test"
                worker.do(turn)
    after = scores(run.path, "test")
    assert after.keys() == before.keys() and not any(after[key] == before[key] for key in before)
    assert len({data["bold"] for data in after.values()}) == 1
    assert {data["features"] for data in after.values()} == {data["features"] for data in before.values()}


def test_a_worker_sees_that_shards_were_built_again_under_it(lab: Lab) -> None:
    from trainer.errors import InputError

    with StopRequest() as stop:
        ranks = OneProcess(torch.device("cpu"))
        worker = Worker(RunDirectory(lab.folder / "run"), ["test"], ranks, stop, until_finished=True)
        task = worker.turn()
        assert task is not None and not isinstance(task, int)
        change(lab, ("1", "a1"))
        with pytest.raises(InputError, match="s/a1: other BOLD of subject 1"):
            worker.do(task)


def test_names_and_groups_of_a_layout_are_no_data(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.name, lab.tr = "another", 1.49
    lab.build()
    assert warned(capsys, "evaluate", str(lab.folder / "run"), "--set", "test") == ""
    assert main(["export", str(lab.folder / "run"), "--out", str(lab.folder / "export")]) == 0
    facts = json.loads((lab.folder / "export" / "config.json").read_text())
    assert (facts["data"], facts["tr"]) == ("mine", 1.5), "what it was trained on"


def test_a_report_tells_what_the_shards_are_not(lab: Lab) -> None:
    more(lab)
    results = read_results(lab.folder / "run")
    assert results.notes == [] and results.config is not None and results.manifest is not None
    rows = data_table(results.config, results.manifest, results.record).groups[""]
    assert sorted(row[:2] for row in rows) == [["test", "1"], ["train", "2"], ["val", "1"]]
    change(lab, ("1", "a1"))
    assert any("s/a1: other BOLD of subject 1" in note for note in read_results(lab.folder / "run").notes)


def test_a_table_of_runs_tells_which_were_scored_on_other_bold(lab: Lab) -> None:
    shutil.copytree(lab.folder / "run", lab.folder / "runs" / "one")
    change(lab, ("1", "c1"))
    assert main(["evaluate", str(lab.folder / "run"), "--set", "test"]) == 0
    shutil.copytree(lab.folder / "run", lab.folder / "runs" / "two")
    lines = table([lab.folder / "runs" / name for name in ("one", "two")]).splitlines()
    said = "one and two were scored on different BOLD, so they cannot be compared."
    assert lines[3:] == [f"r1 test: {said}", f"r2 test: {said}"]
    assert table([lab.folder / "runs" / "one"]).count("\n") == 1


def test_remote_shards_are_compared_too(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    run, cache = lab.folder / "run", lab.folder / "cache"
    for path in run.glob("stage*/config.yaml"):
        text = path.read_text().replace(f"shards: {lab.shards}", f'shards: "pipe:cat {lab.shards}"')
        path.write_text(text.replace("cache_dir: null", f"cache_dir: {cache}"))
    more(lab)
    assert main(["evaluate", str(run), "--set", "test"]) == 0
    assert cache.is_dir()
    change(lab, ("2", "b1"))
    assert "s/b1: other BOLD of subject 2" in refused(capsys, "evaluate", str(run))


def test_shards_without_hashes_are_told_by_their_manifest(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    run = lab.folder / "run"
    shutil.rmtree(run)
    lab.without_hashes()
    assert main(train(lab, run)) == 0
    assert not any(
        h for s in json.loads((run / "stage1" / "data.json").read_text())["showings"] for h in s["bold"].values()
    )
    lab.build()  # the same, with hashes
    assert warned(capsys, "evaluate", str(run), "--set", "test") == ""
    undo_stage2(run)
    for hashes in (False, True):
        change(lab, ("2", "b1"))
        if not hashes:
            lab.without_hashes()
        assert "nothing says whether these are the data" in warned(capsys, "evaluate", str(run), "--stage", "1")
        assert "as contents have no hashes" in refused(capsys, *train(lab, run, "--resume"))
    lab.again.clear()
    lab.build()
    assert warned(capsys, *train(lab, run, "--resume")) == ""
    assert all(
        h for s in json.loads((run / "stage2" / "data.json").read_text())["showings"] for h in s["bold"].values()
    )


def test_a_run_from_before_there_were_records_is_told_by_its_checkpoints(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab.folder / "run"
    for path in run.rglob("data.json"):
        path.unlink()
    digest = Manifest.read(lab.shards).digest
    for path in run.rglob("meta.json"):
        assert json.loads(path.read_text())["shards"] == digest
    assert warned(capsys, "evaluate", str(run), "--set", "test") == ""
    more(lab)
    assert "nothing says whether these are the data" in warned(capsys, "evaluate", str(run), "--set", "test")
    undo_stage2(run)
    assert "the shards of" in refused(capsys, *train(lab, run, "--resume"))


def test_a_damaged_record_is_one_line(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    path = lab.folder / "run" / "stage1" / "data.json"
    for text in ("{", "[]", '{"manifest": "", "subjects": [], "showings": [], "sets": {"train": 3}}'):
        path.write_text(text)
        assert "data.json" in refused(capsys, "evaluate", str(lab.folder / "run"), "--stage", "1")


@pytest.mark.parametrize("n_trs", [40, 42])
def test_a_stimulus_in_two_sets_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str], n_trs: int) -> None:
    """Also where the scan of one was longer, so that not all of its features are those of the other."""
    lab = Lab(tmp_path, runs={"a1": 40, "a2": 40, "b1": n_trs, "c1": 40}, twice={"b1": "a1"})
    lab.build()
    options = ["--stage", "1", "stage1.max_steps=2"]
    warnings = warned(capsys, *train(lab, tmp_path / "run", *options))
    assert warnings == "warning: datasets.train and datasets.val hold the same TRs of one stimulus: s_a1 and s_b1\n"


def test_a_truncated_prediction_of_a_fold_is_one_line(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    run = lab.folder / "run"
    path = run / "stage2" / "anchor" / "predictions" / "s_a2.npy"
    whole = path.read_bytes()
    for content in (whole[:-4], whole[:20], b""):
        path.write_bytes(content)
        assert "s_a2.npy: cannot be read" in refused(capsys, "evaluate", str(run), "--stage", "2")
    np.save(path, np.zeros((2, 40, 12), np.float32))
    line = refused(capsys, "evaluate", str(run), "--stage", "2")
    assert "found float32 (2, 40, 12), expected float32 (2, 41, 12)" in line
    path.unlink()
    assert "s_a2.npy: missing" in refused(capsys, "evaluate", str(run), "--stage", "2")
    made_from = path.with_name("made_from.json")
    path.write_bytes(whole)
    made_from.write_text(json.dumps({"s_a2": "f" * 32}))
    undo_stage2(run)
    assert "predicted from other features" in refused(capsys, "evaluate", str(run), "--stage", "2")
    assert "predicted from other features" in refused(capsys, *train(lab, run, "--resume"))
