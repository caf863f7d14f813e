"""Figures are drawn from the files of a run alone, whatever part of it is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from trainer.evaluation.figures import chosen_scores, draw_figures
from trainer.run.directory import RunDirectory


@pytest.fixture
def copy(debug_run: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(debug_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.png", "checkpoints"))
    return RunDirectory(tmp_path / "run")


def test_a_finished_run_has_curves_and_a_map_of_each_stage(copy: RunDirectory) -> None:
    figures = draw_figures(copy)
    assert [path.name for path in figures] == ["curves.png", "stage1_r.png", "stage2_r.png"]
    for path in figures:
        colours = Image.open(path).convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > 50, f"{path.name} is blank"


def test_a_run_that_ended_half_way_has_the_figures_of_what_is_there(copy: RunDirectory) -> None:
    shutil.rmtree(copy.path / "stage2")
    (copy.path / "stage1" / "finished.json").unlink()
    assert [path.name for path in draw_figures(copy)] == ["curves.png"]


def test_an_empty_run_has_none(tmp_path: Path) -> None:
    assert draw_figures(RunDirectory(tmp_path)) == []


def test_the_maps_show_the_chosen_checkpoint_on_every_set(copy: RunDirectory) -> None:
    scores = chosen_scores(copy.stage(2))
    assert [score["set"] for score in scores] == ["test", "val"]
    finished = copy.stage(2).finished()
    assert finished is not None
    assert {score["step"] for score in scores} == {finished["step"]}
