"""How training went: the loss and r over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes

from trainer.evaluation.drawing import INK, MUTED, Drawing, line_style, panel, style

Points = Sequence[tuple[int, float]]
LOSS = {1: "Mean squared error", 2: "Flow matching loss"}


@dataclass(frozen=True)
class Curves:
    """What a stage of one run left of its training.

    Attributes:
        loss: (step, training loss).
        validation_loss: (step, loss on the validation set); empty where it is not looked at.
        r: set -> (step, Pearson's r of the mean).
        chosen: the step that the stage goes on with; None while it has none.
    """

    loss: Points = ()
    validation_loss: Points = ()
    r: Mapping[str, Points] = field(default_factory=dict)
    chosen: int | None = None


def loss_drawing(stage: int, runs: Mapping[str, Curves], name: str) -> Drawing | None:
    """The loss over steps, of each run by its label; None where no run has one."""
    runs = {label: curves for label, curves in runs.items() if curves.loss or curves.validation_loss}
    if not runs:
        return None
    with style():
        figure, axis = panel()
        draw_loss(axis, stage, runs)
    return Drawing(
        name=name,
        figure=figure,
        alt=f"{LOSS[stage]} of stage {stage} over training steps",
        caption=f"{LOSS[stage]} on the training windows"
        + (", and on the validation set (points)." if any(c.validation_loss for c in runs.values()) else "."),
        columns={
            column: values
            for label, curves in runs.items()
            for kind, points in (("training", curves.loss), ("validation", curves.validation_loss))
            if points
            for column, values in _columns(f"{label}: {kind}", points).items()
        },
    )


def draw_loss(axis: Axes, stage: int, runs: Mapping[str, Curves]) -> None:
    """Lines for training, points for validation."""
    alone = len(runs) == 1
    for i, (label, curves) in enumerate(runs.items()):
        look = line_style(i)
        if curves.loss:
            axis.plot(*zip(*curves.loss, strict=True), label="training" if alone else label, **look)
        if curves.validation_loss:
            points = {**look, "color": INK} if alone else look
            mark = {"marker": "o", "linewidth": 0.7, "label": "validation" if alone else None}
            axis.plot(*zip(*curves.validation_loss, strict=True), **{**points, **mark})
    axis.set(title=f"Stage {stage}: loss", xlabel="Training step", ylabel=LOSS[stage])
    if not alone or next(iter(runs.values())).validation_loss:
        axis.legend()


def r_drawing(stage: int, runs: Mapping[str, Curves], name: str) -> Drawing | None:
    """r over steps: of one run on every set, of several on the sets given; None where there is none."""
    runs = {label: curves for label, curves in runs.items() if any(curves.r.values())}
    if not runs:
        return None
    with style():
        figure, axis = panel()
        draw_r(axis, stage, runs)
    return Drawing(
        name=name,
        figure=figure,
        alt=f"Pearson's r of stage {stage} over training steps",
        caption="Pearson's r of the mean, averaged over parcels, then subjects"
        + ("; the dashed line marks the chosen checkpoint." if len(runs) == 1 and _chosen(runs) is not None else "."),
        columns={
            column: values
            for label, curves in runs.items()
            for set_name, points in curves.r.items()
            for column, values in _columns(f"{label}: {set_name}", points).items()
        },
    )


def draw_r(axis: Axes, stage: int, runs: Mapping[str, Curves]) -> None:
    """A line for each run and set."""
    lines = [
        (set_name if len(runs) == 1 else label if len(curves.r) == 1 else f"{label}, {set_name}", points)
        for label, curves in runs.items()
        for set_name, points in curves.r.items()
    ]
    for i, (label, points) in enumerate(lines):
        axis.plot(*zip(*points, strict=True), marker="o", label=label, **line_style(i))
    if len(runs) == 1 and (chosen := _chosen(runs)) is not None:
        axis.axvline(chosen, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axis.set(title=f"Stage {stage}: r", xlabel="Training step", ylabel="Pearson's r")
    widen(axis, at_least=0.01)
    if len(lines) > 1:
        axis.legend()


def widen(axis: Axes, at_least: float) -> None:
    """Keep the axis from showing differences that mean nothing as large ones."""
    low, high = axis.get_ylim()
    missing = max(0.0, at_least - (high - low)) / 2
    axis.set_ylim(low - missing, high + missing)
    axis.ticklabel_format(axis="y", useOffset=False)


def _chosen(runs: Mapping[str, Curves]) -> int | None:
    return next(iter(runs.values())).chosen


def _columns(title: str, points: Points) -> dict[str, list[Any]]:
    return {f"{title} step": [step for step, _ in points], f"{title}": [value for _, value in points]}
