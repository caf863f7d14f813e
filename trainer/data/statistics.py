"""Means and standard deviations over the training TRs, and the scaling of features and BOLD that follows from them.

Whole runs are taken from the manifest's statistics; only a run that a filter cuts is read.

A column that hardly varies in training must not be divided by its own standard deviation: where it varies elsewhere,
its z-scores would be as large as the quotient of both. Such a column counts as constant (`hardly_varies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from trainer.data.manifest import BOLD, Moments, Stream
from trainer.data.plan import Span
from trainer.data.shards import Shards

Mode: TypeAlias = Literal["none", "run", "subject"]

FLOOR = 1e-4
"""The part of the median column's standard deviation below which a column counts as constant."""
_ROUNDING = float(np.finfo(np.float32).eps) / 2
"""What rounding to float32 leaves of a constant's standard deviation, over its mean (at most)."""


def hardly_varies(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Whether a column's standard deviation is below `FLOOR` of the median of its row, or is rounding of its mean.

    The median is taken over the columns that vary at all, so that it is one of what the others have to say, however
    many are constant. Shapes: mean, std (..., D) -> bool (..., D).
    """
    rounding = std <= _ROUNDING * np.abs(mean)
    return rounding | (std < FLOOR * median_std(mean, std))


def median_std(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The median standard deviation of the columns that vary, 0 where none does. (..., D) -> (..., 1)."""
    varying = np.where(std > _ROUNDING * np.abs(mean), std, np.nan)
    known = ~np.isnan(varying).all(axis=-1, keepdims=True)
    return np.where(known, np.nanmedian(np.where(known, varying, 0.0), axis=-1, keepdims=True), 0.0)


@dataclass(frozen=True)
class BoldScaling:
    """How BOLD is z-scored: not at all, by each run's statistics, or by a subject's over the training TRs.

    `mean` and `scale` are (R, S, V) for `run`, (S, V) for `subject`, None for `none`. A parcel that hardly varies is
    divided by the standard deviation of the median parcel; `faint` says which those are, of the shape of `scale`.
    """

    mode: Mode
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None
    faint: np.ndarray | None = None

    @classmethod
    def fit(cls, mode: Mode, shards: Shards, spans: Sequence[Span], keep: Sequence[int] | None = None) -> BoldScaling:
        """Take the statistics: of every whole run, or of the training spans.

        A subject without training TRs has no statistics there: those of all its TRs take their place.

        Args:
            keep: parcels that are divided by their own standard deviation however small it is (1 where they do not
                vary at all).
        """
        if mode == "none":
            return cls(mode)
        whole = shards.manifest.moments(BOLD)
        if mode == "run":
            mean, std = whole.mean, whole.std()
        else:
            count, mean, std = bold_statistics(shards, spans)
            everything = whole.combine()
            absent = (count == 0)[:, None]
            mean, std = np.where(absent, everything.mean, mean), np.where(absent, everything.std(), std)
        faint = hardly_varies(mean, std) & ~_kept(keep, std.shape[-1])
        median = median_std(mean, std)
        scale = np.where(faint, np.where(median > 0, median, 1.0), _scale(mean, std))
        return cls(mode, mean.astype(np.float32), scale.astype(np.float32), faint)

    def apply(self, bold: np.ndarray, sample: int, subject: int) -> None:
        """Scale (T, V) of one subject in place."""
        if self.mean is None or self.scale is None:
            return
        place = (sample, subject) if self.mode == "run" else (subject,)
        bold -= self.mean[place]
        bold /= self.scale[place]


NO_SCALING = BoldScaling("none")


def feature_statistics(
    shards: Shards, spans: Sequence[Span], streams: Sequence[Stream], keep: Sequence[str] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and scale of each stream over the TRs of some spans: two lists of (D,) float32.

    Whole runs come from the manifest; only what a filter cuts is read. Layers of a stream are taken together, as one
    linear map reads them all. The scale is the population standard deviation, and inf for a column that hardly varies.

    Args:
        keep: columns, as `KEY/LAYER:COLUMN`, whose scale is their standard deviation however small it is (1 where they
            do not vary at all).
    """
    means, scales = [], []
    for stream in streams:
        whole = shards.manifest.moments(stream.name)
        parts = [
            Moments(whole.count[span.sample], whole.mean[span.sample], whole.m2[span.sample])
            if _is_whole(shards, span)
            else Moments.of(shards.read(span.sample, stream.name, span.start, span.stop))
            for span in spans
        ]
        total = Moments.stack(parts).combine()
        std = total.std()
        faint = hardly_varies(total.mean, std) & ~_kept(columns_of(stream, keep), stream.width)
        means.append(torch.from_numpy(total.mean).float())
        scales.append(torch.from_numpy(np.where(faint, np.inf, _scale(total.mean, std))).float())
    return means, scales


def columns_of(stream: Stream, keep: Sequence[str] | None) -> Sequence[int] | None:
    """The columns of a stream that `keep` names."""
    if keep is None:
        return None
    return [int(column) for name, column in (entry.rsplit(":", 1) for entry in keep) if name == stream.name]


def bold_statistics(shards: Shards, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BOLD over the TRs of some spans and the subjects that they use, in float64.

    Returns: count (S,), mean (S, V), population standard deviation (S, V); zeros for a subject that no span uses.
    """
    whole = shards.manifest.moments(BOLD)
    parts = []
    for span in spans:
        if _is_whole(shards, span):
            used = np.asarray(span.subjects)
            parts.append(Moments(whole.count[span.sample] * used, whole.mean[span.sample], whole.m2[span.sample]))
        else:
            parts.append(_read_moments(shards, span))
    total = Moments.stack(parts).combine()
    return total.count, total.mean, total.std()


def starting_level(
    shards: Shards, spans: Sequence[Span], scaling: BoldScaling, judged_by: Sequence[Span]
) -> tuple[np.ndarray, np.ndarray]:
    """The level that the biases of the decoders start at: (S, V), and the TRs (S,) that it was taken from.

    It is the mean over the TRs of some spans, for parcels whose mean exceeds one standard deviation, as it does for
    BOLD in the scanner's units; else 0. A bias takes steps of the learning rate, and never reaches a level of
    thousands. BOLD that is z-scored here has no such level.

    Args:
        judged_by: the training set, by which parcels are judged: the anchor of a fold treats a parcel as the anchor of
            all folds does.
    """
    count = np.sum([np.multiply(span.subjects, len(span)) for span in spans], axis=0)
    if scaling.mode != "none":
        return np.zeros((len(count), shards.manifest.parcels)), count
    judged, mean, std = bold_statistics(shards, judged_by)
    far = np.abs(mean) > std
    if spans != judged_by:
        _, mean, std = bold_statistics(shards, spans)
        far = np.where((judged == 0)[:, None], np.abs(mean) > std, far)  # one whom a refit alone learns from
    return np.where(far, mean, 0.0), count


def _read_moments(shards: Shards, span: Span) -> Moments:
    present = shards.manifest.samples[span.sample].subjects
    nothing = np.zeros(shards.manifest.parcels)
    absent = Moments(np.asarray(0, np.int64), nothing, nothing)
    return Moments.stack(
        [
            Moments.of(shards.read(span.sample, BOLD, span.start, span.stop, row=present.index(label)))
            if used
            else absent
            for label, used in zip(shards.manifest.subjects, span.subjects, strict=True)
        ]
    )


def _is_whole(shards: Shards, span: Span) -> bool:
    return span.start == 0 and span.stop == shards.manifest.samples[span.sample].n_trs


def _kept(keep: Sequence[int] | None, width: int) -> np.ndarray:
    """(width,) bool: the columns that are kept."""
    return np.ones(width, bool) if keep is None else np.isin(np.arange(width), keep)


def _scale(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The standard deviation, and 1 for what does not vary (rounding leaves it a little above 0)."""
    return np.where(std > 1e-9 * np.abs(mean), std, 1.0)
