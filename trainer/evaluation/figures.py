"""Which figures a run has: those that training leaves beside the stages, and all that a report shows.

They read the files of the run only, so they can be drawn again at any time, on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.evaluation import maps, signals
from trainer.evaluation.curves import Curves, draw_loss, draw_r, loss_drawing, r_drawing
from trainer.evaluation.drawing import PAGE, Drawing, save_figure, style
from trainer.evaluation.results import Distribution, RunResults, Scored, StageResults, read_results
from trainer.run.directory import RunDirectory
from trainer.scoring.ceilings import LEAST_CEILING
from trainer.scoring.records import PAIRS

ESTIMATES = {"mean": "mean", "sample": "one sample"}


def draw_figures(run: RunDirectory) -> list[Path]:
    """Draw curves.png and stageN_r.png, what the run's files allow of them; returns their paths."""
    results = read_results(run.path)
    with style():
        figures = {"curves.png": _all_curves(results)}
        figures |= {f"stage{number}_r.png": _all_maps(stage) for number, stage in results.stages.items()}
    return [save_figure(figure, run.path / name) for name, figure in figures.items() if figure is not None]


def _all_curves(results: RunResults) -> Figure | None:
    """Loss and r over steps, a row for each stage."""
    rows = {n: stage.curves for n, stage in results.stages.items() if stage.curves.loss or stage.curves.r}
    if not rows:
        return None
    figure = Figure(figsize=(PAGE, 2.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (number, curves) in zip(axes, rows.items(), strict=True):
        draw_loss(left, number, {"": curves})
        draw_r(right, number, {"": curves})
    return figure


def _all_maps(stage: StageResults) -> Figure | None:
    """r of every subject and parcel, a panel for each set that the checkpoint was scored on, in one scale."""
    panels = {s.set_name: s for s in stage.scored if s.estimate == "mean" and s.r is not None}
    arrays = {name: scored.r for name, scored in sorted(panels.items()) if scored.r is not None}
    if not arrays:
        return None
    limit = maps.map_limit(list(arrays.values()))
    height = 0.5 + sum(0.45 + 0.2 * len(array) for array in arrays.values())
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    axes = figure.subplots(len(arrays), 1, squeeze=False)[:, 0]
    for axis, (name, array) in zip(axes, arrays.items(), strict=True):
        image = maps.draw_map(axis, array, panels[name].subjects, limit)
        axis.set_title(scored_title(panels[name]))
    axes[-1].set_xlabel("Parcel")
    ends = maps.extend(np.concatenate([array.ravel() for array in arrays.values()]), limit)
    figure.colorbar(image, ax=list(axes), label="Pearson's r", extend=ends, pad=0.015)
    return figure


def model_name(scored: Scored) -> str:
    """Which stage's estimate it is, as in tables and titles."""
    estimate = "" if scored.stage == 1 else f", {ESTIMATES.get(scored.estimate, scored.estimate)}"
    return f"Stage {scored.stage}{estimate}{' (refit)' if scored.refitted else ''}"


def scored_title(scored: Scored) -> str:
    """Model, set, step and r in one line."""
    r = scored.score.get("pearson_r")
    known = "not a number" if r is None else f"{r:.4f}".replace("-", "−")
    return f"{model_name(scored)}, {scored.set_name}, step {scored.score['step']}: mean r = {known}"


def over_ceiling(r: np.ndarray, ceiling: np.ndarray) -> np.ndarray:
    """r over the noise ceiling (S, V); NaN where the ceiling is below `LEAST_CEILING` or not known."""
    return np.divide(r, ceiling, out=np.full(r.shape, np.nan), where=ceiling >= LEAST_CEILING)


def curve_drawings(runs: Mapping[str, RunResults], prefix: str = "") -> list[Drawing]:
    """Loss and r over steps of both stages; of several runs, by label, r on the first's validation set alone."""
    drawings = []
    validation = next(iter(runs.values())).validation
    for number in (1, 2):
        curves = {label: run.stages[number].curves for label, run in runs.items() if number in run.stages}
        if len(runs) > 1:
            curves = {label: _only(found, validation) for label, found in curves.items()}
        drawings += [
            loss_drawing(number, curves, f"{prefix}loss-stage{number}"),
            r_drawing(number, curves, f"{prefix}r_over_steps-stage{number}"),
        ]
    return [drawing for drawing in drawings if drawing is not None]


def _only(curves: Curves, set_name: str | None) -> Curves:
    r = {name: points for name, points in curves.r.items() if name == set_name}
    return Curves(curves.loss, curves.validation_loss, r, curves.chosen)


def map_drawings(scored: Scored, ceiling: np.ndarray | None, prefix: str = "") -> list[Drawing]:
    """Subject x parcel maps of r, and of r over the ceiling where one fits."""
    if scored.r is None:
        return []
    where = f"stage{scored.stage}-{scored.set_name}"
    if scored.estimate != "mean":
        where += f"-{scored.estimate}"
    drawings = [maps.heat_map(f"{prefix}r-{where}", scored_title(scored), scored.r, scored.subjects, "Pearson's r")]
    if ceiling is not None and ceiling.shape == scored.r.shape:
        ratio = over_ceiling(scored.r, ceiling)
        title = f"{model_name(scored)}, {scored.set_name}, step {scored.score['step']}: r over the noise ceiling"
        name = f"{prefix}r_over_ceiling-{where}"
        drawings.append(maps.heat_map(name, title, ratio, scored.subjects, "r / ceiling"))
    return drawings


def network_drawing(runs: Mapping[str, Scored], labels: Sequence[str], prefix: str = "") -> Drawing | None:
    """r by network of several models on one set, by label; None where no array fits the labels."""
    arrays = {label: s.r for label, s in runs.items() if s.r is not None and s.r.shape[1] == len(labels)}
    arrays = {label: r for label, r in arrays.items() if np.isfinite(r).any()}
    if not arrays:
        return None
    set_name = next(iter(runs.values())).set_name
    subjects = {label: runs[label].subjects for label in arrays}
    return maps.networks(f"{prefix}networks-{set_name}", f"r by network, {set_name}", arrays, subjects, labels)


def series_drawing(stage: StageResults, set_name: str, prefix: str = "") -> Drawing | None:
    """The predicted and the real series of a set; None where they are not there."""
    arrays, scored = stage.series.get(set_name), stage.find(set_name)
    if arrays is None or scored is None or scored.r is None:
        return None
    name = f"{prefix}series-stage{stage.number}-{set_name}"
    return signals.series(name, f"Stage {stage.number}, {set_name}", arrays, scored.subjects, scored.r)


def distribution_drawings(found: Distribution, set_name: str, prefix: str = "") -> list[Drawing]:
    """Calibration, spectrum and functional connectivity of stage 2's samples beside the baselines, as far as known."""
    judged = {key: facts for key in signals.JUDGED if isinstance(facts := found.facts.get(key), Mapping)}
    reached = {
        key: {percent / 100: facts.get(f"coverage_{percent}") for percent in (50, 80, 95)}
        for key, facts in judged.items()
    }
    arrays = found.arrays
    spectra = {key: arrays[f"spectrum_{key}"] for key in maps.MODELS if f"spectrum_{key}" in arrays}
    frequency = arrays.get("frequency_hz", np.zeros(0))
    drawings: list[Drawing | None] = [
        signals.calibration(f"{prefix}calibration-{set_name}", set_name, reached),
        signals.spectrum(f"{prefix}spectrum-{set_name}", set_name, frequency, spectra),
    ]
    matrices = {key: arrays[f"fc_{key}"] for key in maps.MODELS if f"fc_{key}" in arrays}
    if matrices:
        title = set_name + (f", {pairs}" if (pairs := pairs_of_parcels(found.facts)) else "")
        drawings.append(maps.connectivity(f"{prefix}connectivity-{set_name}", title, matrices))
    return [drawing for drawing in drawings if drawing is not None]


def pairs_of_parcels(facts: Mapping[str, Any]) -> str | None:
    """Of how many parcels the pairs were judged, in words; None where of all."""
    pairs = facts.get(PAIRS)
    return f"{pairs['taken']:,} of {pairs['of']:,} parcels, spread evenly" if isinstance(pairs, Mapping) else None
