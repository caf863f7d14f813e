"""Whatever a score file lacks leaves a gap or a dash: no figure, table or page dies of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.conftest import copy_run
from tests.evaluation.test_figures import is_whole
from tests.evaluation.test_report import Page
from trainer.cli import main
from trainer.evaluation import figures, maps, sections, signals, tables
from trainer.evaluation.curves import Curves, loss_drawing, r_drawing
from trainer.evaluation.drawing import Drawing
from trainer.evaluation.results import Distribution, RunResults, Scored, StageResults, read_results
from trainer.run.directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("error")

SHAPES = {"as usual": (3, 8, 60), "one subject": (1, 8, 60), "one parcel": (3, 1, 60), "one TR": (3, 8, 1),
          "two TRs": (3, 8, 2), "one of all": (1, 1, 1)}  # fmt: skip
GAPS = ("nothing", "a parcel", "a subject", "everything")


def with_gap(values: np.ndarray, gap: str) -> np.ndarray:
    """Values (..., S, V) of which some are not numbers."""
    found = values.astype(float)
    where = {
        "nothing": (..., slice(0), slice(0)),
        "a parcel": (..., slice(None), 0),
        "a subject": (..., 0, slice(None)),
    }
    found[where.get(gap, ...)] = np.nan
    return found


PAIRS = [("as usual", gap) for gap in GAPS]
PAIRS += zip(list(SHAPES)[1:], (*GAPS[1:], "a parcel", "nothing"), strict=True)


@pytest.fixture(params=PAIRS, ids=", ".join)
def stage(request: pytest.FixtureRequest) -> StageResults:
    """Stage 2 of a run with one set, scored in full."""
    shape, gap = request.param
    n_subjects, n_parcels, n_trs = SHAPES[shape]
    rng = np.random.default_rng(0)
    r = with_gap(rng.normal(0.1, 0.1, (n_subjects, n_parcels)), gap)
    known = None if np.isnan(r).any() else float(r.mean())
    subjects = [str(s) for s in range(n_subjects)]
    score = {"set": "val", "estimate": "mean", "step": 5, "subjects": subjects, "pearson_r": known, "full": True,
             "ci": None if known is None else [0.0, 0.2], "rsa": {"all": known, "Vis": known}}  # fmt: skip
    bold = rng.normal(size=(n_subjects, 2, n_trs))
    if gap in ("a subject", "everything"):
        bold[: 1 if gap == "a subject" else None] = np.nan
    parcels = np.where(np.isnan(bold).all(axis=2), -1, 0)
    series = {"run": np.array("run"), "tr_s": np.array(1.5), "parcels": parcels, "bold": bold, "mean": bold / 2,
              "samples": np.stack([bold, bold])}  # fmt: skip
    unknown = gap != "nothing"
    facts: dict[str, Any] = {"samples": 2}
    arrays: dict[str, np.ndarray] = {"frequency_hz": np.fft.rfftfreq(n_trs, 1.5)[1:]}
    for key in maps.MODELS:
        lost = gap == "everything" or (unknown and key != "flow")
        judged = dict.fromkeys(tables.JUDGEMENTS, None if lost else 0.5)
        facts |= {} if key == "bold" else {key: judged}
        fc = np.corrcoef(rng.normal(size=(n_parcels, 9))).reshape(n_parcels, n_parcels)
        arrays[f"fc_{key}"] = with_gap(fc, gap)
        arrays[f"spectrum_{key}"] = np.full(len(arrays["frequency_hz"]), np.nan if lost else 2.0)
    curves = Curves([(1, 1.0)], [(1, 1.1)], {"val": [] if known is None else [(5, known)]}, 5)
    bootstrap = with_gap(rng.normal(size=(7, n_subjects)), "nothing")
    if unknown:
        bootstrap[:, 0] = np.nan
    scored = Scored(2, False, score, r, bootstrap)
    return StageResults(2, curves=curves, step=5, scored=[scored], distributions={"val": Distribution(facts, arrays)},
                        series={"val": series})  # fmt: skip


def drawings_of(stage: StageResults) -> Iterator[Drawing | None]:
    """All figures that a report may have of a stage."""
    (scored,) = stage.scored
    assert scored.r is not None
    n_parcels = scored.r.shape[1]
    yield loss_drawing(2, {"run": stage.curves}, "loss")
    yield r_drawing(2, {"run": stage.curves}, "r")
    yield from figures.map_drawings(scored, np.full(scored.r.shape, 0.05))
    yield figures.network_drawing({"one": scored, "two": scored}, ["Vis"] * n_parcels)
    yield figures.series_drawing(stage, "val")
    yield from figures.distribution_drawings(stage.distributions["val"], "val")


def test_every_figure_is_drawn_or_left_out(stage: StageResults) -> None:
    drawn = [drawing for drawing in drawings_of(stage) if drawing is not None]
    assert len(drawn) >= 4
    assert all(is_whole(drawing) for drawing in drawn)


def test_every_section_is_written(stage: StageResults) -> None:
    run = RunResults(Path("run"), {2: stage})
    other = RunResults(Path("other"), {1: StageResults(1), 2: stage})
    for runs in ({"run": run}, {"run": run, "other": other}):
        assert sections.lead(runs)
        for section in sections.sections(runs, "No labels."):
            for part in (*section.parts, *section.folded):
                cells = [
                    cell for table in part.tables for rows in table.groups.values() for row in rows for cell in row
                ]
                assert not any("nan" in cell.lower() or "none" in cell.lower() for cell in cells)


FLOW = {0.5: 0.4, 0.95: 0.9}


@pytest.mark.parametrize(
    ("reached", "lines"),
    [
        ({"flow": FLOW, "independent": {0.5: None, 0.95: None}}, ["flow"]),
        ({"flow": FLOW, "independent": {0.5: None, 0.95: 0.9}}, ["flow", "independent"]),
        ({"flow": {0.5: math.nan, 0.95: 0.9}, "full_covariance": {}}, ["flow"]),
        ({"independent": {0.5: None}}, []),
        ({}, []),
    ],
)
def test_calibration_draws_what_is_known(reached: Mapping[str, Mapping[float, float | None]], lines: list[str]) -> None:
    drawing = signals.calibration("c", "val", reached)
    assert (drawing is None) == (not lines)
    if drawing is not None:
        assert list(drawing.columns) == ["nominal", *lines]


def test_a_spectrum_of_no_frequency_or_of_other_frequencies_is_left_out() -> None:
    frequency = np.array([0.1, 0.2])
    assert signals.spectrum("s", "val", np.zeros(0), {"flow": np.zeros(0)}) is None
    assert signals.spectrum("s", "val", frequency, {"flow": np.zeros(2), "bold": np.full(2, np.nan)}) is None
    drawing = signals.spectrum("s", "val", frequency, {"flow": np.ones(3), "bold": np.array([1.0, np.nan])})
    assert drawing is not None and "Flow" not in drawing.alt


def test_numbers_that_are_not_known_are_dashes() -> None:
    assert [tables.percent(math.nan), tables.percent(math.inf)] == [tables.NOTHING] * 2
    assert [tables.interval([None, None]), tables.interval([0.1, math.nan])] == [tables.NOTHING] * 2


def test_a_set_whose_r_is_not_a_number_stands_in_the_table_with_a_dash() -> None:
    score = {"set": "val", "estimate": "mean", "step": 5, "subjects": ["1"], "pearson_r": None, "n_trs": 7}
    run = RunResults(Path("run"), {1: StageResults(1, scored=[Scored(1, False, score)])})
    (row,) = tables.score_table({"run": run}).groups["val"]
    assert row == ["Stage 1", "5", "7"], "a column of which nothing is known is left out"
    both = RunResults(Path("run"), {n: StageResults(n, scored=[Scored(n, False, score)]) for n in (1, 2)})
    assert tables.difference_table({"run": both}).groups["val"][0][1] == tables.NOTHING


def rewrite(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def nothing_but_r(score: dict[str, Any]) -> None:
    """A score file as another version may have written it."""
    for key in set(score) - {"stage", "step", "set", "estimate", "subjects", "pearson_r", "validation", "flow_loss"}:
        del score[key]


def without_numbers(score: dict[str, Any]) -> None:
    """Whatever is a number is null."""
    for key, value in score.items():
        if isinstance(value, dict):
            without_numbers(value)
        elif isinstance(value, float) or (isinstance(value, list) and all(isinstance(item, float) for item in value)):
            score[key] = None


@pytest.mark.filterwarnings("default")
def test_a_page_is_written_of_files_that_say_less(full_run: Path, tmp_path: Path) -> None:
    run = copy_run(full_run, tmp_path / "run")
    for path in run.glob("stage*/scores/*.json"):
        rewrite(path, without_numbers if "stage2" in str(path) else nothing_but_r)
    for path in run.glob("stage*/scores/*-series.npz"):
        np.savez(path, run=np.array("x"), bold=np.full((4, 2, 1), np.nan))
    assert main(["report", str(run)]) == 0
    page = Page(run / "report.html")
    assert "Traceback" not in page.text and " nan" not in page.text
    assert figures.draw_figures(RunDirectory(run))
    assert {score.set_name for score in read_results(run).stages[2].scored} == {"val", "test"}
