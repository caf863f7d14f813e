"""A sweep file becomes runs with names of their own; their scores become one table."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.cli import main
from trainer.cluster import sweep
from trainer.cluster.sweep import Element, Scores, checked, elements, link_stage1, named, subjects, table
from trainer.config import load_config
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory
from trainer.run.files import read_json, write_json
from trainer.strict import parse_yaml


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_lists_of_values_are_their_product(tmp_path: Path) -> None:
    found = elements(written(tmp_path, "stage1.lr: [1e-3, 3e-4]\nseed: [1, 2]\n"))
    assert found == [
        Element("stage1.lr=0.001,seed=1", ("stage1.lr=0.001", "seed=1")),
        Element("stage1.lr=0.001,seed=2", ("stage1.lr=0.001", "seed=2")),
        Element("stage1.lr=0.0003,seed=1", ("stage1.lr=0.0003", "seed=1")),
        Element("stage1.lr=0.0003,seed=2", ("stage1.lr=0.0003", "seed=2")),
    ]


def test_a_list_of_mappings_is_as_given_and_sections_may_be_nested(tmp_path: Path) -> None:
    text = (
        "- {stage1: {lr: 1e-3, model: {hidden_model: null}}}\n- {stage2.decoder.channels: [64, 64], precision: 'no'}\n"
    )
    assert elements(written(tmp_path, text)) == [
        Element(
            "stage1.lr=0.001,stage1.model.hidden_model=null", ("stage1.lr=0.001", "stage1.model.hidden_model=null")
        ),
        Element("stage2.decoder.channels=64-64,precision=no", ("stage2.decoder.channels=[64, 64]", "precision=no")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", r"seed: found 1, expected a list of values, e\.g\. \[1\]"),
        ("seed: []", "expected a list of values"),
        ("seed", "is no sweep"),
        ("[1, 2]", "is no sweep"),
        ("{}", "leaves nothing to run"),
        ("[]", "leaves nothing to run"),
        ("[{seed: 1}, {}]", "leaves nothing to run"),
        ("seed: [1, 1]", "gives a run twice: found seed=1"),
        ("seed: [1\n", "not valid YAML"),
    ],
)
def test_what_is_no_sweep_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        elements(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        elements(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.lrr=1", "stage1.lrr=1: .*Did you mean stage1.lr"),
        ("seed=-1", "seed=-1: .*seed"),
        (f"seed={2**64}", "seed: found 18446744073709551616, expected at least 0 and at most"),
        ("stage1.lr=.inf", "stage1.lr: found inf, expected a finite number"),
        ("batch_size=1_0", "batch_size: found '1_0', expected an integer"),
        ("slurm.partition=big", "differs in what it asks of SLURM"),
    ],
)
def test_every_run_is_checked_before_anything_is_submitted(override: str, message: str, debug_config: Path) -> None:
    chosen = named([("seed=2",), (override,)], Path("sweep.yaml"))
    with pytest.raises(InputError, match=message):
        checked(chosen, debug_config)
    found = checked(chosen[:1], debug_config, ["seed=1", "batch_size=2"])
    assert [(config.seed, config.batch_size) for config in found] == [(2, 2)]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80),
    st.lists(st.integers(0, 9) | st.text("ab /", max_size=3), max_size=3),
)


@given(st.lists(st.dictionaries(st.sampled_from(["seed", "a.b", "a.c"]), VALUES, min_size=1), min_size=1, max_size=6))
def test_names_are_safe_and_each_runs_own_and_values_are_read_as_they_were(chosen: list[dict[str, Any]]) -> None:
    words = [tuple(f"{key}={sweep._text(value)}" for key, value in one.items()) for one in chosen]
    found = named(list(dict.fromkeys(words)), Path("sweep.yaml"))
    names = [element.name for element in found]
    assert len({name.lower() for name in names}) == len(names)
    assert all(len(name) <= 120 and set(name) <= set(SAFE) and not name.startswith((".", "-")) for name in names)
    for one, overrides in zip(chosen, words, strict=True):
        read = [parse_yaml(word.partition("=")[2]) for word in overrides]
        assert read == list(one.values()) and list(map(type, read)) == list(map(type, one.values()))


SAFE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+_-=,~"


@given(st.sets(st.integers(0, 50), min_size=1), st.integers(51, 60))
def test_a_run_keeps_its_name_when_others_are_added(seeds: set[int], new: int) -> None:
    before = named([(f"seed={seed}",) for seed in seeds], Path("sweep.yaml"))
    assert named([(f"seed={seed}",) for seed in [*seeds, new]], Path("sweep.yaml"))[:-1] == before


def test_the_table_says_what_differs_and_marks_the_best_on_the_validation_set(debug_config: Path) -> None:
    one, other = (load_config(debug_config, [f"stage1.lr={lr}"]) for lr in (1e-3, 3e-4))
    found = [
        Scores("a", one, {(1, "val"): 0.2, (1, "test"): 0.5, (2, "val"): 0.3}, frozenset({1, 2})),
        Scores("b", other, {(1, "val"): 0.25, (1, "test"): None}, frozenset({1})),
        Scores("c", None, {}),
    ]
    assert list(sweep.rows_of(found)) == [
        ["run", "stage1.lr", "r1 val", "r1 test", "r2 val", "not finished"],
        ["a", "0.001", "0.2000", "0.5000", "0.3000*", ""],
        ["b", "0.0003", "0.2500*", "", "", "stage2"],
        ["c", "", "", "", "", "stage1 stage2"],
    ]


def test_the_table_of_runs_on_disk_is_printed_aligned_and_written(debug_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "a_run_with_a_longer_name"
    shutil.copytree(debug_run / "stage1", run / "stage1", ignore=shutil.ignore_patterns("checkpoints"))
    config = yaml.safe_load((run / "stage1" / "config.yaml").read_text())
    (run / "stage1" / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 7}))
    (run / "stage1" / "finished.json").unlink()
    lines = table([debug_run, run, tmp_path / "nothing"], tmp_path / "scores.csv").splitlines()
    rows = list(csv.reader((tmp_path / "scores.csv").read_text().splitlines()))
    assert rows[0] == ["run", "seed", "r1 val", "r1 test", "r2 val", "r2 test", "not finished"]
    assert [row[1] for row in rows[1:]] == ["3315", "7", ""]
    assert [row[-1] for row in rows[1:]] == ["", "stage1 stage2", "stage1 stage2"]
    assert rows[1][4].endswith("*") and rows[2][4] == ""
    assert [line.split() for line in lines[1:]] == [" ".join(filter(None, row)).split() for row in rows[1:]]
    assert len({line.index(row[1]) for line, row in zip(lines[1:3], rows[1:3], strict=True)}) == 1


def test_a_refit_is_what_a_table_compares(tmp_path: Path, debug_config: Path) -> None:
    stage = RunDirectory(tmp_path).stage(1)
    stage.begin(load_config(debug_config).to_yaml())
    stage.write_finished(step=8)
    for part, name, step, r in (
        (stage, "val", 4, 0.9),
        (stage, "val", 8, 0.2),
        (stage, "test", 8, 0.1),
        (stage.refit, "test", 8, 0.3),
    ):
        score = {"set": name, "step": step, "estimate": "mean", "pearson_r": r}
        write_json(part.scores / f"step_{step:08d}-{name}-mean.json", score)
    assert sweep.read_scores(tmp_path).r == {(1, "val"): 0.2, (1, "test"): 0.3}


def test_each_subject_that_is_trained_gets_a_run_in_all_sets(
    debug_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    shards = f"data.shards={tiny_shards}"
    found = subjects(load_config(debug_config, [shards]), tmp_path)
    assert [element.name for element in found] == ["subject_1", "subject_2", "subject_3", "subject_5"]
    assert found[0].overrides == tuple(f'datasets.{name}.filter.subjects=["1"]' for name in ("train", "val", "test"))
    some = [f"datasets.{name}.filter.subjects=[1,3]" for name in ("train", "val")]
    found = subjects(load_config(debug_config, [shards, *some]), tmp_path)
    assert [element.name for element in found] == ["subject_1", "subject_3"]
    with pytest.raises(InputError, match=r"datasets\.val\.filter\.subjects: lacks 3: .* trained: 1, 3"):
        subjects(load_config(debug_config, [shards, some[0], "datasets.val.filter.subjects=[1]"]), tmp_path)


def test_the_runs_of_subjects_share_a_stage_1_that_need_not_be_there_yet(
    debug_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    config = load_config(debug_config, [f"data.shards={tiny_shards}"])
    chosen = subjects(config, tmp_path)
    assert not list(tmp_path.iterdir())
    link_stage1(tmp_path, chosen)
    link_stage1(tmp_path, subjects(config, tmp_path))
    RunDirectory(tmp_path).claim([1], resume=False, overwrite=False)
    RunDirectory(tmp_path).stage(1).begin("")
    assert RunDirectory(tmp_path / "subject_2").stage(1).has_started()
    RunDirectory(tmp_path / "subject_2").claim([2], resume=False, overwrite=False)
    (tmp_path / "subject_1" / "stage1").unlink()
    (tmp_path / "subject_1" / "stage1").mkdir()
    with pytest.raises(InputError, match=r"subject_1/stage1: is not the stage 1 of the run around it"):
        subjects(config, tmp_path)


def test_a_file_system_without_symbolic_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    expected = "subject_1/stage1: cannot be made as a symbolic link: Operation not permitted. Choose a --run on"
    with pytest.raises(InputError, match=expected):
        link_stage1(tmp_path, [Element("subject_1", ())])


def test_stage_2_of_one_subject_stands_on_the_stage_1_of_all(
    debug_run: Path, tmp_path: Path, debug_config: Path, tiny_shards: Path
) -> None:
    shutil.copytree(debug_run / "stage1", tmp_path / "stage1")
    common = [f"data.shards={tiny_shards}", "stage2.subjects=separate", "bold.standardise=none"]
    element = subjects(load_config(debug_config, common), tmp_path)[1]
    link_stage1(tmp_path, [element])
    run = tmp_path / element.name
    arguments = ["--config", str(debug_config), "--run", str(run), "--stage", "2", *common, *element.overrides]
    assert main(["train", *arguments]) == 0
    scores = list(RunDirectory(run).stage(2).read_scores())
    assert {score["set"] for score in scores} == {"val", "test"}
    assert all([label for label, r in score["per_subject"].items() if r is not None] == ["2"] for score in scores)
    for fold in (1, 2):  # the anchors that stage 2 learns from are those that it has where all are trained at once
        ours, theirs = (weights(path / "stage2" / "anchor" / f"fold_{fold}") for path in (run, debug_run))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    step = read_json(run / "stage2" / "finished.json")["step"]
    model = checkpoint.load(checkpoint.folder_of(run / "stage2" / "checkpoints", step)).model
    assert all(np.isfinite(tensor.numpy()).all() for tensor in model.values())
    assert main(["train", *arguments, "--resume"]) == 0, "it is finished, and says so"


def weights(folder: Path) -> dict[str, Any]:
    checkpoints = folder / "checkpoints"
    last = checkpoint.steps(checkpoints)[-1]
    return {name: t.numpy() for name, t in checkpoint.load(checkpoint.folder_of(checkpoints, last)).model.items()}


def test_the_command_tells_of_all_runs_in_a_folder_that_have_begun(
    debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("seed=1", "seed=2"):
        shutil.copytree(debug_run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "seed=3" / "slurm").mkdir(parents=True)
    assert sweep.main([str(tmp_path), "--report"]) == 0
    said = capsys.readouterr().out
    assert "seed=1" in said and "seed=2" in said and "seed=3" not in said
    assert (tmp_path / "scores.csv").exists()
    page = (tmp_path / "report.html").read_text()
    assert "seed=1" in page and "seed=2" in page
    assert sweep.main([str(tmp_path / "seed=3")]) == 2
    assert "holds no run that has begun" in capsys.readouterr().err
