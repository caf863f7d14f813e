"""What a batch is, and how windows of TRs are read into one: straight into its buffers, with masks for what is absent.

Features stay in their stored dtype (standardising them is folded into the model); BOLD is float32. What a mask leaves
out is zero in the batch and was never read. All of a batch lies in one buffer, so that buffers can be used again:
memory that is touched for the first time costs more than the reading.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.data.manifest import BOLD, Manifest, Stream
from trainer.data.plan import Span, Window
from trainer.data.statistics import NO_SCALING, BoldScaling

Anchors = Mapping[int, np.ndarray]
"""Sample index -> predictions (S, T of the run, V), NaN where there are none; may be memory maps."""

_ALIGNMENT = 64


class Source(Protocol):
    """What windows are read from: the shards, or a copy of them in memory."""

    @property
    def manifest(self) -> Manifest:
        """What is there."""

    def read(
        self, sample: int, name: str, start: int, stop: int, out: np.ndarray | None = None, row: int | None = None
    ) -> np.ndarray:
        """As Shards.read."""


@dataclass
class Batch:
    """B windows of T TRs, S subjects (all of the manifest's) and V parcels.

    Attributes:
        features: one (B, T, D) or (B, T, L, D) for each stream, in the stored dtype.
        bold: (B, S, T, V) float32, zero where `loss_mask` or `subject_mask` is false.
        mask: (B, T) bool, the TRs that exist and feed the model: false behind a short window or a run's end.
        loss_mask: (B, T) bool, the TRs that are learnt from or scored: `mask` without the context around a window.
        subject_mask: (B, S) bool, whose BOLD is there and used.
        windows: (B,) int64, number of the window in its epoch: the key of its randomness.
        anchor: (B, S, T, V) float32, stored predictions, or None.
    """

    features: list[Tensor]
    bold: Tensor
    mask: Tensor
    loss_mask: Tensor
    subject_mask: Tensor
    windows: Tensor
    anchor: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""
        return Batch(
            [change(f) for f in self.features],
            change(self.bold),
            change(self.mask),
            change(self.loss_mask),
            change(self.subject_mask),
            change(self.windows),
            None if self.anchor is None else change(self.anchor),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which a GPU copies while the training goes on."""
        return self.each(Tensor.pin_memory)

    def scored(self) -> slice:
        """The TRs that are scored, without the context, in a batch of one span."""
        return _extent(self.loss_mask[0])

    def cut(self, trs: slice) -> Batch:
        """Some of the batch's TRs."""
        return replace(
            self,
            features=[f[:, trs] for f in self.features],
            bold=self.bold[:, :, trs],
            mask=self.mask[:, trs],
            loss_mask=self.loss_mask[:, trs],
            anchor=None if self.anchor is None else self.anchor[:, :, trs],
        )


def _extent(mask: Tensor) -> slice:
    """From the first to the last True of (T,)."""
    there = mask.nonzero()
    return slice(int(there[0]), int(there[-1]) + 1)


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a batch, and where each of its tensors lies in one buffer of `nbytes` bytes."""

    windows: int
    n_trs: int
    streams: tuple[Stream, ...]
    subjects: int
    parcels: int
    with_anchor: bool = False

    def _parts(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        b, t = self.windows, self.n_trs
        bold = ((b, self.subjects, t, self.parcels), torch.float32)
        return [
            *(((b, t, *stream.row), getattr(torch, stream.dtype)) for stream in self.streams),
            bold,
            ((b, t), torch.bool),
            ((b, t), torch.bool),
            ((b, self.subjects), torch.bool),
            ((b,), torch.int64),
            *([bold] if self.with_anchor else []),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole batch."""
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in self._parts())

    def views(self, flat: Tensor) -> Batch:
        """A batch whose tensors lie in `flat`, (nbytes,) uint8; what stands there is not changed."""
        tensors, offset = [], 0
        for shape, dtype in self._parts():
            size = math.prod(shape) * dtype.itemsize
            tensors.append(flat[offset : offset + size].view(dtype).view(shape))
            offset += _aligned(size)
        count = len(self.streams)
        return Batch(tensors[:count], *tensors[count:])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def fill(
    batch: Batch,
    source: Source,
    windows: Sequence[Window],
    streams: Sequence[Stream],
    scaling: BoldScaling,
    context: int = 0,
    anchor: Anchors | None = None,
) -> None:
    """Write windows into a batch whose memory may hold anything: what is not read is set to zero.

    TR `start - context` of a window stands at position 0. A window's features reach `context` TRs beyond it on both
    sides, as far as its run does; BOLD and predictions do not.
    """
    features = [f.numpy() for f in batch.features]
    bold, mask, loss_mask = batch.bold.numpy(), batch.mask.numpy(), batch.loss_mask.numpy()
    stored = None if batch.anchor is None else batch.anchor.numpy()
    mask[:] = loss_mask[:] = False
    for i, window in enumerate(windows):
        first = max(window.start - context, 0)
        last = min(window.stop + context, source.manifest.samples[window.sample].n_trs)
        place = slice(first - window.start + context, last - window.start + context)
        inner = slice(context, context + len(window))
        mask[i, place] = loss_mask[i, inner] = True
        for stream, array in zip(streams, features, strict=True):
            rows = _kept(array[i], place)
            source.read(window.sample, stream.name, first, last, rows)
        _read_bold(source, window, scaling, bold[i], inner)
        if stored is not None and anchor is not None:
            _copy_anchor(anchor, window, stored[i], inner)
    batch.subject_mask.numpy()[:] = [window.subjects for window in windows]
    batch.windows.numpy()[:] = [window.index for window in windows]


def _kept(rows: np.ndarray, kept: slice) -> np.ndarray:
    """The rows of `kept`; zeros are written into the others."""
    if kept.stop - kept.start == len(rows):
        return rows
    rows[: kept.start] = 0
    rows[kept.stop :] = 0
    return rows[kept]


def _read_bold(source: Source, window: Window, scaling: BoldScaling, target: np.ndarray, inner: slice) -> None:
    """One read for each used subject, into (S, T, V)."""
    present = source.manifest.samples[window.sample].subjects
    for subject, label in enumerate(source.manifest.subjects):
        if window.subjects[subject]:
            out = _kept(target[subject], inner)
            source.read(window.sample, BOLD, window.start, window.stop, out, row=present.index(label))
            scaling.apply(out, window.sample, subject)
        else:
            target[subject] = 0


def _copy_anchor(anchor: Anchors, window: Window, target: np.ndarray, inner: slice) -> None:
    """Stored predictions of the used subjects, into (S, T, V)."""
    predictions = anchor[window.sample]
    for subject, used in enumerate(window.subjects):
        if used:
            _kept(target[subject], inner)[:] = predictions[subject, window.start : window.stop]
        else:
            target[subject] = 0


def make_batch(
    source: Source,
    windows: Sequence[Window],
    streams: Sequence[Stream],
    scaling: BoldScaling = NO_SCALING,
    *,
    sample_length: int | None = None,
    context: int = 0,
    anchor: Anchors | None = None,
) -> Batch:
    """Read windows into one batch of new memory, padded to `sample_length` TRs (to the longest window without it).

    T is `sample_length + 2 * context`. Streams may be empty. Absent and unused subjects are not read.
    """
    n_trs = (sample_length or max(len(window) for window in windows)) + 2 * context
    manifest = source.manifest
    size = len(windows), n_trs, tuple(streams), len(manifest.subjects), manifest.parcels
    shape = BatchShape(*size, with_anchor=anchor is not None)
    batch = shape.views(torch.empty(shape.nbytes, dtype=torch.uint8))
    fill(batch, source, windows, streams, scaling, context, anchor)
    return batch


def whole_runs(
    source: Source,
    spans: Sequence[Span],
    streams: Sequence[Stream],
    scaling: BoldScaling = NO_SCALING,
    *,
    context: int = 0,
    anchor: Anchors | None = None,
    rank: int = 0,
    world: int = 1,
    numbers: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """A batch of one whole span after the other, in their order; `windows` counts the spans.

    With `numbers`, only the spans of these numbers are read.

    With `context`, a span that a filter cut out of a run sees the run's features around it; a span that reaches the
    ends of its run is read as it is. Of the spans that are read, rank r of `world` gets number r, r + world, ..., each
    with its number in `spans`.
    """
    for i in itertools.islice(range(len(spans)) if numbers is None else numbers, rank, None, world):
        span = spans[i]
        window = Window(i, span.sample, span.start, span.stop, span.subjects)
        batch = make_batch(source, [window], streams, scaling, context=context, anchor=anchor)
        yield batch.cut(_extent(batch.mask[0])) if context else batch
