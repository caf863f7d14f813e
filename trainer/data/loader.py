"""Windows -> batches: read from shards straight into the batch's buffers, with masks for what is not there.

Features stay in their stored dtype (standardising them is folded into the model); BOLD is float32. What a mask leaves
out is zero in the batch and was never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.manifest import BOLD, Moments, Stream
from trainer.data.plan import Plan, Span, Window, share
from trainer.data.shards import Shards

Anchors = Mapping[int, np.ndarray]
"""Sample index -> predictions (S, T of the run, V), NaN where there are none; may be memory maps."""


@dataclass
class Batch:
    """B windows of T TRs, S subjects (all of the manifest's) and V parcels.

    Attributes:
        features: one (B, T, D) or (B, T, L, D) for each stream, in the stored dtype.
        bold: (B, S, T, V) float32, zero where a mask is false.
        mask: (B, T) bool, false behind the end of a short window.
        subject_mask: (B, S) bool, whose BOLD is there and used.
        windows: (B,) int64, number of the window in its epoch: the key of its randomness.
        anchor: (B, S, T, V) float32, stored predictions, or None.
    """

    features: list[Tensor]
    bold: Tensor
    mask: Tensor
    subject_mask: Tensor
    windows: Tensor
    anchor: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            [move(f) for f in self.features],
            move(self.bold),
            move(self.mask),
            move(self.subject_mask),
            move(self.windows),
            None if self.anchor is None else move(self.anchor),
        )


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


def make_batch(
    shards: Shards,
    windows: Sequence[Window],
    streams: Sequence[Stream],
    scaling: BoldScaling = NO_SCALING,
    *,
    sample_length: int | None = None,
    anchor: Anchors | None = None,
) -> Batch:
    """Read windows into one batch, padded to `sample_length` TRs (to the longest window without it).

    Streams may be empty. Absent and unused subjects are not read.
    """
    count = len(windows)
    n_trs = sample_length or max(len(window) for window in windows)
    size = (count, len(shards.manifest.subjects), n_trs, shards.manifest.parcels)
    features = [torch.zeros(count, n_trs, *s.row, dtype=getattr(torch, s.dtype)) for s in streams]
    bold = torch.zeros(size)
    stored = None if anchor is None else torch.zeros(size)
    mask = torch.zeros(count, n_trs, dtype=torch.bool)
    for i, window in enumerate(windows):
        mask[i, : len(window)] = True
        for stream, tensor in zip(streams, features, strict=True):
            target = tensor[i, : len(window)].numpy()
            shards.read(window.sample, stream.name, window.start, window.stop, target)
        _read_bold(shards, window, scaling, bold[i].numpy())
        if anchor is not None and stored is not None:
            used = np.flatnonzero(window.subjects)
            stored[i].numpy()[used, : len(window)] = anchor[window.sample][used, window.start : window.stop]
    subject_mask = torch.tensor([window.subjects for window in windows], dtype=torch.bool)
    numbers = torch.tensor([window.index for window in windows], dtype=torch.int64)
    return Batch(features, bold, mask, subject_mask, numbers, stored)


def _read_bold(shards: Shards, window: Window, scaling: BoldScaling, target: np.ndarray) -> None:
    """One read for each used subject, into (S, T, V)."""
    present = shards.manifest.samples[window.sample].subjects
    for subject, label in enumerate(shards.manifest.subjects):
        if window.subjects[subject]:
            out = target[subject, : len(window)]
            shards.read(window.sample, BOLD, window.start, window.stop, out, row=present.index(label))
            scaling.apply(out, window.sample, subject)


class _Batches(Dataset[Batch]):
    """Item k is this rank's part of global batch k: what a sampler asks for is all there is to the order."""

    def __init__(
        self,
        shards: Shards,
        plan: Plan,
        streams: Sequence[Stream],
        scaling: BoldScaling,
        epoch: int,
        part: tuple[int, int],
        anchor: Anchors | None,
    ) -> None:
        self.shards, self.plan, self.streams, self.scaling = shards, plan, streams, scaling
        self.epoch, self.part, self.anchor = epoch, part, anchor

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, k: int) -> Batch:
        windows = share(self.plan.batch(self.epoch, k), *self.part)
        return make_batch(
            self.shards,
            windows,
            self.streams,
            self.scaling,
            sample_length=self.plan.sample_length,
            anchor=self.anchor,
        )


def training_batches(
    shards: Shards,
    plan: Plan,
    streams: Sequence[Stream],
    scaling: BoldScaling,
    epoch: int,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    anchor: Anchors | None = None,
) -> Iterator[Batch]:
    """This rank's part of the global batches of an epoch, from batch `start` on.

    Raises:
        InputError: the global batch does not divide by the number of ranks (at once, not at the first batch).
    """
    share(range(plan.batch_size), rank, world)
    dataset = _Batches(shards, plan, streams, scaling, epoch, (rank, world), anchor)
    order = range(start, plan.steps_per_epoch)
    # A generator of its own: the loader would otherwise draw a seed, which nothing here needs, from the global one.
    generator = torch.Generator()
    return iter(DataLoader(dataset, batch_size=None, sampler=order, num_workers=num_workers, generator=generator))


def whole_runs(
    shards: Shards,
    spans: Sequence[Span],
    streams: Sequence[Stream],
    scaling: BoldScaling = NO_SCALING,
    *,
    anchor: Anchors | None = None,
) -> Iterator[Batch]:
    """A batch of one whole span after the other, in their order; `windows` counts the spans."""
    for i, span in enumerate(spans):
        window = Window(i, span.sample, span.start, span.stop, span.subjects)
        yield make_batch(shards, [window], streams, scaling, anchor=anchor)


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
