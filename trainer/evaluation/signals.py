"""What it predicts in time: a parcel's series with its samples, their spectrum, and whether intervals hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from trainer.evaluation.drawing import BLUE, CYCLE, DASHES, INK, MUTED, PAGE, VERMILLION, Drawing, panel, style
from trainer.evaluation.maps import MARKERS, MODELS

SHOWN_S = 300.0
"""Seconds of a series that a page is wide enough for."""
BAND = (10, 90)
"""Percentiles of the samples that the band spans: 80 % of them."""
JUDGED = tuple(key for key in MODELS if key != "bold")


def series(name: str, title: str, arrays: Mapping[str, Any], subjects: Sequence[str], r: np.ndarray) -> Drawing | None:
    """Predicted and real BOLD of the best and the median parcel of the subject who is predicted best.

    None where nobody has both BOLD and an r, or the arrays are not those of this r.

    Args:
        arrays: of a -series.npz: run, tr_s, parcels (S, 2), bold and mean (S, 2, T), and samples (K, S, 2, T) of a
            stage that draws them; NaN for absent subjects.
        r: (S, V), by which subject and parcels are chosen and named.
    """
    subject = _best(arrays, r)
    if subject is None:
        return None
    seconds = np.arange(arrays["bold"].shape[-1]) * float(arrays["tr_s"])
    shown = _middle(seconds)
    columns: dict[str, Any] = {"seconds": seconds}
    with style():
        figure, _ = panel(PAGE, 3.1)
        figure.clear()
        axes = figure.subplots(2, 1, sharex=True)
        for i, (axis, which) in enumerate(zip(axes, ("Best", "Median"), strict=True)):
            parcel = int(arrays["parcels"][subject, i])
            lines = _lines(arrays, subject, i)
            _draw_series(axis, seconds[shown], {key: line[shown] for key, line in lines.items()})
            known = f"{r[subject, parcel]:.2f}" if np.isfinite(r[subject, parcel]) else "not a number"
            axis.set_title(f"{which} parcel: {parcel + 1}, r = {known}".replace("-", "−"))
            columns |= {f"parcel {parcel + 1}: {key}": line for key, line in lines.items()}
        axes[1].set_xlabel("Time in the run (s)")
        figure.supylabel("BOLD (units of the data)", fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3)
    samples = f" The band holds 80 % of {len(arrays['samples'])} samples." if "samples" in arrays else ""
    cut = f" {SHOWN_S / 60:.0f} of {seconds[-1] / 60:.0f} minutes." if len(seconds[shown]) < len(seconds) else ""
    return Drawing(
        name=name,
        figure=figure,
        alt=f"Predicted and real BOLD over time in two parcels of subject {subjects[subject]}",
        caption=f"{title}: run {arrays['run']}, subject {subjects[subject]} (the best predicted).{cut}{samples}",
        columns=columns,
        wide=True,
    )


def _best(arrays: Mapping[str, Any], r: np.ndarray) -> int | None:
    """The subject of the highest r among those whose series are there; None where there is none."""
    if not {"bold", "mean", "parcels", "tr_s", "run"} <= arrays.keys() or len(arrays["bold"]) != len(r):
        return None
    known = np.isfinite(arrays["bold"]).any(axis=(1, 2)) & (arrays["parcels"] >= 0).all(axis=1)
    known &= (arrays["parcels"] < r.shape[1]).all(axis=1)
    numbers = np.isfinite(r)
    means = np.where(numbers, r, 0.0).sum(axis=1) / np.maximum(numbers.sum(axis=1), 1)
    # of a subject with a parcel that is no number the mean is not known, but it is shown before nothing is
    rated = np.where(known & numbers.any(axis=1), means - 2.0 * ~numbers.all(axis=1), -np.inf)
    return int(rated.argmax()) if np.isfinite(rated).any() else None


def _middle(seconds: np.ndarray) -> slice:
    """The middle `SHOWN_S` seconds."""
    margin = (seconds[-1] - SHOWN_S) / 2
    if margin <= 0:
        return slice(None)
    first, last = np.searchsorted(seconds, [margin, margin + SHOWN_S])
    return slice(int(first), int(last))


def _lines(arrays: Mapping[str, Any], subject: int, parcel: int) -> dict[str, np.ndarray]:
    """The series of one subject and parcel by name, (T,) each."""
    lines = {"BOLD": arrays["bold"][subject, parcel], "predicted mean": arrays["mean"][subject, parcel]}
    if "samples" in arrays:
        low, high = np.percentile(arrays["samples"][:, subject, parcel], BAND, axis=0)
        lines |= {f"{BAND[0]} %": low, f"{BAND[1]} %": high, "one sample": arrays["samples"][0, subject, parcel]}
    return lines


def _draw_series(axis: Axes, seconds: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    if "one sample" in lines:
        low, high = (lines[f"{percent} %"] for percent in BAND)
        axis.fill_between(seconds, low, high, color=BLUE, alpha=0.22, linewidth=0, label="80 % of the samples")
    point: dict[str, Any] = {"marker": "o"} if len(seconds) == 1 else {}  # one TR makes no line
    axis.plot(seconds, lines["BOLD"], color=INK, linewidth=0.8, label="real BOLD", **point)
    axis.plot(seconds, lines["predicted mean"], color=VERMILLION, linewidth=1.5, label="predicted mean", **point)
    if not point:
        axis.margins(x=0)


def spectrum(name: str, title: str, frequency: np.ndarray, spectra: Mapping[str, np.ndarray]) -> Drawing | None:
    """Power over frequency (F,) in Hz of real BOLD and of what stands for it, by keys of `MODELS`.

    What is 0 or not a number leaves a gap, as it has no place on a logarithmic axis; None where nothing is left.
    """
    with np.errstate(invalid="ignore"):
        shown = {
            key: np.where((frequency > 0) & (power > 0) & np.isfinite(power), power, np.nan)
            for key, power in spectra.items()
            if power.shape == frequency.shape
        }
    shown = {key: power for key, power in shown.items() if np.isfinite(power).any()}
    if not shown:
        return None
    positive = frequency > 0
    mark = {"marker": "o"} if positive.sum() == 1 else {}
    with style():
        figure, axis = panel()
        for key, power in shown.items():
            axis.loglog(frequency[positive], power[positive], label=MODELS[key], **mark, **_look(key))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_locator(NullLocator())
        axis.set(title="Power spectrum", xlabel="Frequency (Hz)", ylabel="Power (units of BOLD² / Hz)")
        axis.legend(loc="lower left")
    return Drawing(
        name=name,
        figure=figure,
        alt=f"Power spectra of {', '.join(MODELS[key] for key in shown)}",
        caption=f"{title}: power spectrum, averaged over parcels and subjects.",
        columns={"frequency_hz": frequency, **spectra},
    )


def calibration(name: str, title: str, reached: Mapping[str, Mapping[float, float | None]]) -> Drawing | None:
    """Nominal against reached coverage of intervals: model (a key of `MODELS`) -> nominal -> reached, fractions.

    A model of which nothing is known has no line, and of one level no point; None where nothing at all is known.
    """
    known = {
        key: {nominal: float(v) for nominal, v in points.items() if v is not None and math.isfinite(v)}
        for key, points in reached.items()
    }
    known = {key: points for key, points in known.items() if points}
    if not known:
        return None
    with style():
        figure, axis = panel()
        axis.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), label="exact")
        for key, points in known.items():
            percents = 100 * np.array(sorted(points.items()), np.float64)
            axis.plot(*percents.T, marker=MARKERS[JUDGED.index(key)], label=MODELS[key], **_look(key))
        axis.set(title="Calibration", xlabel="Nominal coverage (%)", ylabel="Reached coverage (%)")
        ends = [100 * value for points in known.values() for pair in points.items() for value in pair]
        low = max(0.0, min(ends) - 8)
        axis.set(xlim=(low, 100), ylim=(low, 100))
        axis.legend(loc="upper left")
    nominal = sorted({value for points in known.values() for value in points})
    return Drawing(
        name=name,
        figure=figure,
        alt="Reached over nominal coverage of prediction intervals; on the diagonal they are exact",
        caption=f"{title}: how often real BOLD lies inside intervals. Below the diagonal they are too narrow.",
        columns={"nominal": nominal, **{k: [p.get(n, "") for n in nominal] for k, p in known.items()}},
    )


def _look(key: str) -> dict[str, Any]:
    """Real BOLD in ink, the flow and its baselines each in a colour and dashes of their own."""
    if key == "bold":
        return {"color": INK, "linewidth": 1.6}
    i = JUDGED.index(key)
    return {"color": (VERMILLION, BLUE, CYCLE[2])[i], "linestyle": DASHES[i]}
