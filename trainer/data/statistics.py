"""Means and standard deviations over the training TRs, and the scaling of BOLD that follows from them.

Whole runs are taken from the manifest's statistics; only a run that a filter cuts is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainer.data.manifest import BOLD, Moments, Stream
from trainer.data.plan import Span
from trainer.data.shards import Shards


@dataclass(frozen=True)
class BoldScaling:
    """How BOLD is z-scored: not at all, by each run's statistics, or by a subject's over the training TRs.

    `mean` and `scale` are (R, S, V) for `run`, (S, V) for `subject`, None for `none`. Constant parcels have scale 1.
    """

    mode: Literal["none", "run", "subject"]
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None

    @classmethod
    def fit(cls, mode: Literal["none", "run", "subject"], shards: Shards, spans: Sequence[Span]) -> BoldScaling:
        """Take the statistics: of every whole run, or of the training spans."""
        if mode == "none":
            return cls(mode)
        if mode == "run":
            moments = shards.manifest.moments(BOLD)
            mean, std = moments.mean, moments.std()
        else:
            _, mean, std = bold_statistics(shards, spans)
        return cls(mode, mean.astype(np.float32), _scale(mean, std).astype(np.float32))

    def apply(self, bold: np.ndarray, sample: int, subject: int) -> None:
        """Scale (T, V) of one subject in place."""
        if self.mean is None or self.scale is None:
            return
        place = (sample, subject) if self.mode == "run" else (subject,)
        bold -= self.mean[place]
        bold /= self.scale[place]


NO_SCALING = BoldScaling("none")


def feature_statistics(
    shards: Shards, spans: Sequence[Span], streams: Sequence[Stream]
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and population standard deviation of each stream over the TRs of some spans: two lists of (D,) float32.

    Whole runs come from the manifest; only what a filter cuts is read. Layers of a stream are taken together, as one
    linear map reads them all. A constant feature has scale 1.
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
        means.append(torch.from_numpy(total.mean).float())
        scales.append(torch.from_numpy(_scale(total.mean, total.std())).float())
    return means, scales


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


def _scale(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The standard deviation, and 1 for what does not vary (rounding leaves it a little above 0)."""
    return np.where(std > 1e-9 * np.abs(mean), std, 1.0)
