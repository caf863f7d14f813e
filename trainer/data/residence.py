"""Where the selected spans stand while they are read: on the device, in memory once per node, or on disk.

Batches are the same to the bit in all three places. What a copy does not hold is read from the shards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import Anchors, Batch
from trainer.data.manifest import BOLD, Manifest, Stream
from trainer.data.memory import free_host_memory
from trainer.data.plan import Span, Window
from trainer.data.shards import Shards
from trainer.data.sharing import SharedMemory, is_shared
from trainer.data.statistics import BoldScaling
from trainer.errors import InputError

Place = Literal["device", "host", "disk"]
Extents = Mapping[int, tuple[int, int]]
"""Sample index -> the first TR that is needed and the one after the last."""


def extents(spans: Sequence[Span], manifest: Manifest, context: int) -> dict[int, tuple[int, int]]:
    """What a copy must hold to read any window of some spans, with context on both sides."""
    found: dict[int, tuple[int, int]] = {}
    for span in spans:
        first, last = found.get(span.sample, (span.start, span.stop))
        n_trs = manifest.samples[span.sample].n_trs
        found[span.sample] = max(min(first, span.start - context), 0), min(max(last, span.stop + context), n_trs)
    return found


def size_of(needed: Extents, manifest: Manifest, streams: Sequence[Stream]) -> int:
    """Bytes of a copy, as stored."""
    row = sum(math.prod(stream.row) * np.dtype(stream.dtype).itemsize for stream in streams)
    return sum(
        (last - first) * (row + 4 * manifest.parcels * len(manifest.samples[sample].subjects))
        for sample, (first, last) in needed.items()
    )


def choose(wanted: str, size: int, device_free: int | None, host_free: int) -> tuple[Place, str]:
    """Where a copy of `size` bytes stands, and why.

    `auto` takes the first of device and host of whose free memory the copy needs no more than half.

    Args:
        wanted: data.residence.
        device_free, host_free: bytes; None without a GPU.

    Raises:
        InputError: `device` or `host` is asked for, and there is not enough memory.
    """
    if wanted == "disk":
        return "disk", f"{_gb(size)} are read window by window, as configured"
    if wanted == "device" or wanted == "host":
        free = host_free if wanted == "host" or device_free is None else device_free
        if size > free:
            raise InputError(
                "data.residence",
                f"too little free memory for {wanted}",
                found=_gb(free),
                expected=f"at least the {_gb(size)} of the data",
                fix="Use data.residence: auto, or disk.",
            )
        return ("device" if wanted == "device" else "host"), f"{_gb(size)}, as configured"
    if device_free is not None and size <= device_free / 2:
        return "device", f"{_gb(size)}, at most half of the {_gb(device_free)} that are free on the GPU"
    gpu = "there is no GPU" if device_free is None else f"more than half of the {_gb(device_free)} free on the GPU"
    if size <= host_free / 2:
        return "host", f"{_gb(size)}: {gpu}, and at most half of the {_gb(host_free)} of free memory"
    return "disk", f"{_gb(size)}: {gpu}, and more than half of the {_gb(host_free)} of free memory"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def free_memory(device: torch.device) -> tuple[int | None, int]:
    """Bytes free on a GPU (None for any other device), and in memory, within the limits of the process's job."""
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return on_device, free_host_memory()


def reside(
    wanted: str,
    shards: Shards,
    needed: Extents,
    streams: Sequence[Stream],
    scaling: BoldScaling,
    device: torch.device,
) -> tuple[Shards | HostCopy | DeviceCopy, str]:
    """What to read from, and a line that says which it is and why. Raises InputError (see `choose`)."""
    size = size_of(needed, shards.manifest, streams)
    device_free, host_free = free_memory(device)
    if is_shared(HostCopy.name(shards.manifest, needed, streams)):
        host_free = max(host_free, 2 * size)  # another process of this node has found the room for it
    place, why = choose(wanted, size, device_free, host_free)
    line = f"data.residence: {place} ({why})"
    if place == "device":
        return DeviceCopy(shards, needed, streams, scaling, device), line
    return (HostCopy(shards, needed, streams) if place == "host" else shards), line


class HostCopy:
    """The needed TRs of every array in memory, once per node; read like Shards.

    Raises:
        InputError: a shard cannot be read, or the process that fills the copy does not come to an end.
    """

    def __init__(self, shards: Shards, needed: Extents, streams: Sequence[Stream]) -> None:
        self.shards, self.needed = shards, dict(needed)
        self._places, size = _places(shards.manifest, needed, streams)
        self._shared = SharedMemory(self.name(shards.manifest, needed, streams), size, self._copy)

    @property
    def manifest(self) -> Manifest:
        """What the shards hold."""
        return self.shards.manifest

    @staticmethod
    def name(manifest: Manifest, needed: Extents, streams: Sequence[Stream]) -> str:
        """Of the memory: equal for equal content."""
        content = ([s.sha256 for s in manifest.shards], sorted(needed.items()), [s.name for s in streams])
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]

    def _copy(self, memory: np.ndarray) -> None:
        """Fill the memory from the shards."""
        for (sample, name), place in self._places.items():
            rows = range(place.rows) if name == BOLD else [None]
            for row in rows:
                out = place.array(memory, row)
                self.shards.read(sample, name, place.first, place.last, out, row=row)

    def read(
        self, sample: int, name: str, start: int, stop: int, out: np.ndarray | None = None, row: int | None = None
    ) -> np.ndarray:
        """As Shards.read."""
        place = self._places.get((sample, name))
        if place is None or (name == BOLD and row is None) or start < place.first or stop > place.last:
            return self.shards.read(sample, name, start, stop, out, row)
        rows = place.array(self._shared.array, row)[start - place.first : stop - place.first]
        if out is None:
            return rows.copy()
        np.copyto(out, rows, casting="no")
        return out


@dataclass(frozen=True)
class _Place:
    """Where TRs [first, last) of an array stand in the copy; `rows` subjects for BOLD, 1 for a stream."""

    offset: int
    first: int
    last: int
    rows: int
    inner: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one subject, or of a stream."""
        return (self.last - self.first) * math.prod(self.inner) * self.dtype.itemsize

    def array(self, memory: np.ndarray, row: int | None) -> np.ndarray:
        """(last - first, ...) of a stream, or of one row of BOLD."""
        offset = self.offset + (row or 0) * self.row_bytes
        return memory[offset : offset + self.row_bytes].view(self.dtype).reshape(-1, *self.inner)


def _places(
    manifest: Manifest, needed: Extents, streams: Sequence[Stream]
) -> tuple[dict[tuple[int, str], _Place], int]:
    places: dict[tuple[int, str], _Place] = {}
    offset = 0
    for sample, (first, last) in sorted(needed.items()):
        for name in (BOLD, *(stream.name for stream in streams)):
            stored = manifest.samples[sample].arrays[name]
            rows, inner = (stored.shape[0], stored.shape[2:]) if name == BOLD else (1, stored.shape[1:])
            place = _Place(offset, first, last, rows, inner, np.dtype(stored.dtype))
            places[sample, name] = place
            offset += -(-rows * place.row_bytes // 64) * 64
    return places, max(offset, 1)


class DeviceCopy:
    """The needed TRs as tensors on a device: a batch is one gather a stream, and nothing is read or moved.

    BOLD is scaled when it is copied. A row of zeros stands behind each table, for all that is absent from a batch.
    """

    def __init__(
        self, shards: Shards, needed: Extents, streams: Sequence[Stream], scaling: BoldScaling, device: torch.device
    ) -> None:
        self.manifest, self.needed, self.device = shards.manifest, dict(needed), device
        self._first_row: dict[int, int] = {}
        self._first_bold_row: dict[int, int] = {}
        rows = bold_rows = 0
        for sample, (first, last) in self.needed.items():
            self._first_row[sample], self._first_bold_row[sample] = rows, bold_rows
            rows += last - first
            bold_rows += (last - first) * len(self.manifest.samples[sample].subjects)
        self._features = {s.name: torch.zeros(rows + 1, *s.row, dtype=getattr(torch, s.dtype)) for s in streams}
        self._features = {name: table.to(device) for name, table in self._features.items()}
        self._bold = torch.zeros(bold_rows + 1, self.manifest.parcels, device=device)
        for sample, (first, last) in self.needed.items():
            for stream in streams:
                values = shards.read(sample, stream.name, first, last)
                self._put(self._features[stream.name], self._first_row[sample], values)
            for row, subject in self._rows(sample):
                values = shards.read(sample, BOLD, first, last, row=row)
                scaling.apply(values, sample, subject)
                self._put(self._bold, self._bold_row(sample, row), values)
        self._anchor: Anchors | None = None
        self._predicted = self._bold[:0]
        self._predicted_samples: set[int] = set()

    def _rows(self, sample: int) -> list[tuple[int, int]]:
        """(row of the stored BOLD, subject) of a sample's present subjects that are on the subject axis."""
        subjects = self.manifest.subjects
        present = enumerate(self.manifest.samples[sample].subjects)
        return [(row, subjects.index(label)) for row, label in present if label in subjects]

    def _put(self, table: Tensor, row: int, values: np.ndarray) -> None:
        table[row : row + len(values)].copy_(torch.from_numpy(values))

    def _bold_row(self, sample: int, row: int) -> int:
        """Where the BOLD of a sample's present subject begins."""
        first, last = self.needed[sample]
        return self._first_bold_row[sample] + row * (last - first)

    def batch(
        self,
        windows: Sequence[Window],
        streams: Sequence[Stream],
        sample_length: int,
        context: int = 0,
        anchor: Anchors | None = None,
    ) -> Batch:
        """The batch that `make_batch` reads from the shards, on the device."""
        n_trs, subjects = sample_length + 2 * context, self.manifest.subjects
        rows = np.full((len(windows), n_trs), -1, np.int64)
        bold_rows = np.full((len(windows), len(subjects), n_trs), -1, np.int64)
        loss_mask = np.zeros((len(windows), n_trs), bool)
        for i, window in enumerate(windows):
            sample = self.manifest.samples[window.sample]
            begin = self.needed[window.sample][0]
            first, last = max(window.start - context, 0), min(window.stop + context, sample.n_trs)
            place = slice(first - window.start + context, last - window.start + context)
            inner = slice(context, context + len(window))
            rows[i, place] = np.arange(first - begin, last - begin) + self._first_row[window.sample]
            loss_mask[i, inner] = True
            for s, label in enumerate(subjects):
                if window.subjects[s]:
                    row = self._bold_row(window.sample, sample.subjects.index(label))
                    bold_rows[i, s, inner] = np.arange(window.start - begin, window.stop - begin) + row
        there = torch.from_numpy(bold_rows).to(self.device)
        features = torch.from_numpy(rows).to(self.device)
        return Batch(
            [_gather(self._features[stream.name], features) for stream in streams],
            _gather(self._bold, there),
            features >= 0,
            torch.from_numpy(loss_mask).to(self.device),
            torch.tensor([window.subjects for window in windows], dtype=torch.bool, device=self.device),
            torch.tensor([window.index for window in windows], dtype=torch.int64, device=self.device),
            None if anchor is None else _gather(self._predictions(anchor, windows), there),
        )

    def _predictions(self, anchor: Anchors, windows: Sequence[Window]) -> Tensor:
        """Stored predictions in the rows of BOLD, of one stage at a time; a run is read when a window first needs it.

        Raises what `anchor` raises for a run that it holds no predictions of.
        """
        if self._anchor is not anchor:
            self._anchor, self._predicted, self._predicted_samples = anchor, torch.zeros_like(self._bold), set()
        for sample in {window.sample for window in windows} - self._predicted_samples:
            first, last = self.needed[sample]
            predictions = anchor[sample]
            for row, subject in self._rows(sample):
                self._put(self._predicted, self._bold_row(sample, row), np.array(predictions[subject, first:last]))
            self._predicted_samples.add(sample)
        return self._predicted


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table, any shape of indices; -1 is the last row."""
    last = len(table) - 1
    return table.index_select(0, torch.where(rows < 0, last, rows).flatten()).unflatten(0, tuple(rows.shape))
