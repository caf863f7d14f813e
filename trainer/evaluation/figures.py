"""Figures of a run, drawn from its files: loss and r over steps, and r of every subject and parcel.

They read the log and the score files only, so they can be drawn again at any time, on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from trainer.run.directory import RunDirectory, StageDirectory

STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
COLOURS = {1: "#0072B2", 2: "#D55E00"}  # Okabe and Ito's blue and vermillion, told apart by colour-blind readers


def draw_figures(run: RunDirectory) -> list[Path]:
    """Draw what the run's files allow; returns the paths of the figures."""
    with plt.rc_context(STYLE):
        curves = draw_curves(run)
        maps = [draw_heat_map(run, number) for number in (1, 2)]
    return [path for path in (curves, *maps) if path is not None]


def draw_curves(run: RunDirectory) -> Path | None:
    """Training loss and r on the validation set over steps, a row for each stage."""
    logs = {number: run.stage(number).read_metrics() for number in (1, 2)}
    logs = {number: log for number, log in logs.items() if log}
    if not logs:
        return None
    figure, axes = plt.subplots(len(logs), 2, figsize=(8, 2.6 * len(logs)), squeeze=False, layout="constrained")
    for row, (number, log) in zip(axes, logs.items(), strict=True):
        _curve(row[0], log, "train", "loss", COLOURS[number], label="training")
        _curve(row[0], log, "val", "flow_loss", "black", marker="o", label="validation")
        _curve(row[1], log, "val", "pearson_r", COLOURS[number], marker="o")
        names = {line["set"] for line in log if line["kind"] == "val"}
        loss = "Mean squared error" if number == 1 else "Flow matching loss"
        if number == 2:
            row[0].legend()
        row[0].set(title=f"Stage {number}: training", xlabel="Step", ylabel=loss)
        row[1].set(
            title=f"Stage {number}: {', '.join(sorted(names)) or 'validation'}",
            xlabel="Step",
            ylabel="Pearson's r",
        )
        _widen(row[1], at_least=0.01)
    return _save(figure, run.path / "curves.png")


def draw_heat_map(run: RunDirectory, number: int) -> Path | None:
    """r of every subject and parcel, a panel for each set that the chosen checkpoint was scored on."""
    panels = chosen_scores(run.stage(number))
    if not panels:
        return None
    arrays = [np.load(score["path"].with_suffix(".npy")) for score in panels]
    limit = max(0.05, float(np.nanpercentile(np.abs(np.concatenate(arrays)), 99)))
    height = 0.9 + sum(0.55 + 0.22 * len(array) for array in arrays)
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, height), squeeze=False, layout="constrained")
    for axis, score, array in zip(axes[:, 0], panels, arrays, strict=True):
        image = axis.imshow(array, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(
            title=f"Stage {number}, {score['set']}, step {score['step']}: mean r = {score['pearson_r']:.4f}",
            ylabel="Subject",
            yticks=range(len(array)),
            yticklabels=score["subjects"],
        )
        axis.grid(False)
    axes[-1, 0].set_xlabel("Parcel")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="Pearson's r", shrink=0.9)
    return _save(figure, run.path / f"stage{number}_r.png")


def chosen_scores(stage: StageDirectory) -> list[dict[str, Any]]:
    """The score files (`mean`) of the checkpoint that the stage chose, on every set; its refit's where there is one."""
    finished = stage.finished()
    if finished is None:
        return []
    chosen = {}
    for directory in (stage, stage.refit):
        for path, score in directory.scores_with_paths():
            if score["step"] == finished["step"] and score["estimate"] == "mean" and score["pearson_r"] is not None:
                chosen[score["set"]] = {**score, "path": path}
    return [chosen[name] for name in sorted(chosen)]


def _curve(axis: Any, log: list[dict[str, Any]], kind: str, key: str, colour: str, **style: Any) -> None:
    points = [(line["step"], line[key]) for line in log if line["kind"] == kind and line.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), color=colour, markersize=3, linewidth=1.2, **style)


def _widen(axis: Any, at_least: float) -> None:
    """Keep the axis from showing differences that mean nothing as large ones."""
    low, high = axis.get_ylim()
    missing = max(0.0, at_least - (high - low)) / 2
    axis.set_ylim(low - missing, high + missing)
    axis.ticklabel_format(axis="y", useOffset=False)


def _save(figure: Any, path: Path) -> Path:
    aside = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(aside)
    plt.close(figure)
    aside.replace(path)
    return path
