"""Figures are drawn from the files of a run alone, whatever part of it is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.conftest import copy_run
from trainer.evaluation import curves, maps, signals
from trainer.evaluation.curves import Curves
from trainer.evaluation.drawing import Drawing
from trainer.evaluation.figures import draw_figures, map_drawings, over_ceiling
from trainer.evaluation.results import read_results
from trainer.run.directory import RunDirectory


@pytest.fixture
def copy(debug_run: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(copy_run(debug_run, tmp_path / "run"))


def is_whole(drawing: Drawing) -> bool:
    """Whether nothing of a figure, its text above all, lies outside of its paper."""
    drawing.figure.draw_without_rendering()
    box, paper = drawing.figure.get_tightbbox(), drawing.figure.bbox_inches
    return bool((box.min >= paper.min - 0.02).all() and (box.max <= paper.max + 0.02).all())


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
    assert [path.name for path in draw_figures(copy)] == ["curves.png", "stage1_r.png"]
    shutil.rmtree(copy.path / "stage1" / "scores")
    assert [path.name for path in draw_figures(copy)] == ["curves.png"]


def test_an_empty_run_has_none(tmp_path: Path) -> None:
    assert draw_figures(RunDirectory(tmp_path)) == []


def test_the_maps_show_the_chosen_checkpoint_on_every_set(copy: RunDirectory) -> None:
    stage = read_results(copy.path).stages[2]
    finished = copy.stage(2).finished()
    assert finished is not None
    assert {(s.set_name, s.estimate) for s in stage.scored} >= {("test", "mean"), ("val", "mean"), ("val", "sample")}
    assert {s.score["step"] for s in stage.scored} == {stage.step} == {finished["step"]}


def test_parcels_with_a_low_or_unknown_ceiling_have_no_ratio() -> None:
    r = np.array([[0.2, 0.2, 0.2, -0.1]])
    ratio = over_ceiling(r, np.array([[0.4, 0.09, np.nan, 0.1]]))
    np.testing.assert_allclose(ratio, [[0.5, np.nan, np.nan, -1.0]])


def test_a_ceiling_of_other_parcels_is_not_divided_by(copy: RunDirectory) -> None:
    scored = read_results(copy.path).stages[1].scored[0]
    assert len(map_drawings(scored, np.ones((4, 20)))) == 2
    assert len(map_drawings(scored, np.ones((4, 19)))) == 1


def test_the_ends_of_a_colour_bar_tell_what_lies_beyond() -> None:
    assert maps.extend(np.array([0.1, np.nan]), 1.0) == "neither"
    assert maps.extend(np.array([-0.1, 2.0]), 1.0) == "both"
    assert maps.map_limit([np.array([[np.nan]])]) == 0.05


def test_a_network_is_the_mean_of_its_parcels() -> None:
    r = np.array([[0.1, 0.3, 0.5], [0.2, 0.2, 0.0]])
    drawing = maps.networks("n", "n", {"run": r}, {"run": ["1", "2"]}, ["Vis", "Vis", "Default"])
    assert list(drawing.columns["network"]) == ["Vis", "Default"]
    np.testing.assert_allclose(drawing.columns["run: subject 1"], [0.2, 0.5])
    np.testing.assert_allclose(drawing.columns["run: mean"], [0.2, 0.25])


def series_arrays(n_trs: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    bold, samples = rng.normal(size=(3, 2, n_trs)), rng.normal(size=(8, 3, 2, n_trs))
    bold[2] = samples[:, 2] = np.nan
    parcels = np.array([[4, 1], [2, 0], [0, 0]])
    return {"run": np.array("<run>"), "tr_s": np.array(1.5), "parcels": parcels, "bold": bold, "mean": bold / 2,
            "samples": samples}  # fmt: skip


def test_the_series_are_of_the_best_subject_who_has_bold() -> None:
    r = np.stack([np.full(5, 0.1), np.full(5, 0.2), np.full(5, 0.9)])
    arrays = series_arrays()
    drawing = signals.series("s", "s", arrays, ["1", "2", "3"], r)
    assert drawing is not None
    assert "subject 2" in drawing.caption and "<run>" in drawing.caption and "5 of 10 minutes" in drawing.caption
    assert list(drawing.columns["parcel 3: BOLD"]) == list(arrays["bold"][1, 0])
    expected = np.percentile(arrays["samples"][:, 1, 1], 90, axis=0)
    np.testing.assert_allclose(drawing.columns["parcel 1: 90 %"], expected)
    arrays["bold"][:] = np.nan
    assert signals.series("s", "s", arrays, ["1", "2", "3"], r) is None


def test_no_text_of_a_figure_is_cut_off() -> None:
    rng = np.random.default_rng(0)
    long = "a run with a name that is rather long"
    runs = {long: Curves([(10, 1.0), (100000, 0.5)], [(10, 1.1)], {"figures": [(10, 0.1)]}), "b": Curves([(1, 1.0)])}
    networks = [f"Network{i}" for i in range(17) for _ in range(3)]
    r = rng.normal(0.1, 0.1, (3, len(networks)))
    spectra = {key: rng.random(30) + 1e-3 for key in maps.MODELS}
    reached = {key: {0.5: 0.4, 0.95: 0.9} for key in signals.JUDGED}
    drawings = [
        curves.loss_drawing(2, runs, "a"),
        curves.r_drawing(1, runs, "b"),
        maps.heat_map("c", "title", r, ["1", "2", "sub-03"], "Pearson's r"),
        maps.networks("d", "title", {long: r, "b": r}, {long: list("123"), "b": list("123")}, networks),
        maps.connectivity("e", "title", {key: np.corrcoef(r.T) for key in maps.MODELS}),
        signals.series("f", "title", series_arrays(), ["1", "2", "3"], r),
        signals.spectrum("g", "title", np.linspace(0, 0.33, 30), spectra),
        signals.calibration("h", "title", reached),
    ]
    assert all(drawing is not None for drawing in drawings)
    assert [drawing.name for drawing in drawings if drawing is not None and not is_whole(drawing)] == []
