"""Where it is predicted: r of every subject and parcel, of every network, and how parcels go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from trainer.evaluation.drawing import (
    BELOW,
    CYCLE,
    DIVERGING,
    MUTED,
    PAGE,
    RULE,
    SEQUENTIAL,
    Drawing,
    panel,
    style,
)

MARKERS = "osD^"
MODELS = {
    "bold": "Real BOLD",
    "flow": "Flow",
    "independent": "Independent AR(1)",
    "full_covariance": "Full-covariance AR(1)",
}
"""Keys of what a distribution is judged beside, and their names in figures and tables."""


def heat_map(name: str, title: str, values: np.ndarray, subjects: Sequence[str], label: str) -> Drawing:
    """A map subject x parcel of values (S, V) from 0 up; `label` names the quantity."""
    with style():
        figure, axis = panel(PAGE, 0.85 + 0.2 * len(values))
        image = draw_map(axis, values, subjects, map_limit([values]))
        axis.set(title=title, xlabel="Parcel")
        digits = "%.1f" if image.norm.vmax >= 0.2 else "%.2f"  # of one width, so that maps below each other align
        ends = extend(values, image.norm.vmax)
        figure.colorbar(image, ax=axis, label=label, extend=ends, format=digits, pad=0.015, aspect=9)
    below = " Grey: below 0." if (values < 0).any() else ""
    missing = " Empty: not known, or left out." if np.isnan(values).any() else ""
    return Drawing(
        name=name,
        figure=figure,
        alt=f"Heat map, {len(values)} subjects by {values.shape[1]} parcels: {title}",
        caption=f"{label} of every subject (rows) and parcel (columns).{below}{missing}",
        arrays={"": values},
        wide=True,
    )


def draw_map(axis: Axes, values: np.ndarray, subjects: Sequence[str], limit: float) -> Any:
    """The image of values (S, V) between 0 and `limit`; what is below 0 is grey, NaN is left empty."""
    colours = matplotlib.colormaps[SEQUENTIAL].with_extremes(under=BELOW, bad=(0, 0, 0, 0))
    n_subjects, n_parcels = values.shape
    edges = (0.5, n_parcels + 0.5, n_subjects - 0.5, -0.5)  # parcels count from 1, as in the atlas
    image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=limit, interpolation="none", extent=edges)
    axis.set(ylabel="Subject", yticks=range(n_subjects), yticklabels=list(subjects))
    axis.set_xticks(sorted({1, *(tick for tick in axis.get_xticks() if 1 < tick <= n_parcels)}))
    axis.set_xlim(0.5, n_parcels + 0.5)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return image


def map_limit(arrays: Sequence[np.ndarray]) -> float:
    """The upper end of a map: the 99th percentile of what is shown, and no less than 0.05."""
    values = np.concatenate([array[np.isfinite(array)] for array in arrays])
    return max(0.05, float(np.percentile(values, 99))) if len(values) else 0.05


def extend(values: np.ndarray, limit: float) -> str:
    """At which ends of a colour bar values lie beyond it, in matplotlib's word."""
    low, high = bool((values < 0).any()), bool((values > limit).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[low, high]


def networks(
    name: str, title: str, runs: Mapping[str, np.ndarray], subjects: Mapping[str, Sequence[str]], labels: Sequence[str]
) -> Drawing:
    """r by network: the mean over subjects of each run, and every subject.

    Args:
        runs: run -> r (S, V).
        subjects: run -> labels of the subjects (S).
        labels: (V,) the network of each parcel.
    """
    order = list(dict.fromkeys(labels))
    member = np.array([[label == network for label in labels] for network in order])
    means = {run: np.stack([r[:, parcels].mean(axis=1) for parcels in member]) for run, r in runs.items()}
    overall = {run: _known_mean(values) for run, values in means.items()}
    with style():
        figure, axis = panel(height=0.9 + 0.22 * len(order) + 0.15 * len(runs))
        places = np.arange(len(order))
        for i, (run, values) in enumerate(means.items()):
            at = places + (i - (len(means) - 1) / 2) * 0.5 / max(len(means) - 1, 2)
            colour, mark = CYCLE[i % 4], MARKERS[i % 4]
            axis.plot(values, at, linestyle="", marker="|", color=colour, alpha=0.55, markersize=6)
            axis.plot(overall[run], at, linestyle="", marker=mark, color=colour, markersize=5, label=run)
        axis.set(title=title, xlabel="Pearson's r", yticks=places, ylim=(len(order) - 0.4, -0.6))
        axis.set_yticklabels([f"{network} ({n})" for network, n in zip(order, member.sum(axis=1), strict=True)])
        axis.axvline(0, color=MUTED, linewidth=0.7)
        if len(means) > 1:
            figure.legend(loc="outside lower left", ncols=2 if sum(map(len, means)) < 40 else 1)
    columns: dict[str, Any] = {"network": order, "parcels": member.sum(axis=1)}
    for run, values in means.items():
        columns[f"{run}: mean"] = overall[run]
        columns |= {f"{run}: subject {label}": v for label, v in zip(subjects[run], values.T, strict=True)}
    return Drawing(
        name=name,
        figure=figure,
        alt=f"Pearson's r by network: {title}",
        caption="Mean over each network's parcels (in brackets: how many): subjects as strokes, their mean as a point.",
        columns=columns,
    )


def _known_mean(values: np.ndarray) -> np.ndarray:
    """The mean (N,) of the numbers in each row (N, S); NaN where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def connectivity(name: str, title: str, matrices: Mapping[str, np.ndarray]) -> Drawing:
    """Functional connectivity (V, V) of real BOLD and of what stands for it, by keys of `MODELS`."""
    with style():
        figure, _ = panel(PAGE, 2.35)
        figure.clear()
        axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
        for axis, (key, matrix) in zip(axes, matrices.items(), strict=True):
            edges = (0.5, len(matrix) + 0.5, len(matrix) + 0.5, 0.5)
            look = {"cmap": DIVERGING, "vmin": -1, "vmax": 1, "interpolation": "auto", "extent": edges}
            image = axis.imshow(matrix, **look)
            axis.set(title=MODELS[key], xlabel="Parcel")
            axis.title.set_fontsize(8)
            axis.grid(False)
            axis.spines[:].set(visible=True, color=RULE)
        axes[0].set_ylabel("Parcel")
        figure.colorbar(image, ax=list(axes), label="Correlation", shrink=0.72, pad=0.012, aspect=14)
    return Drawing(
        name=name,
        figure=figure,
        alt=f"Functional connectivity matrices of {', '.join(MODELS[key] for key in matrices)}",
        caption=f"{title}: correlation over time of every two parcels, averaged over subjects.",
        arrays=dict(matrices),
        wide=True,
    )
