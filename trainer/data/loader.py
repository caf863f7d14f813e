"""The plan's windows as batches without end, read here or in workers ahead of the training.

A position in the training is a number, and so is what a worker is asked for: nothing is shuffled, counted or replayed,
workers live on from epoch to epoch, and a resume starts anywhere at once. Workers read into a ring of buffers that
they share with the training, so that a batch is never copied on its way; a buffer is used again as soon as no tensor
of its batch is.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.batches import Anchors, Batch, BatchShape, Source, fill
from trainer.data.manifest import Stream
from trainer.data.plan import Part, Plan, Window, micro_batches
from trainer.data.residence import DeviceCopy
from trainer.data.statistics import BoldScaling
from trainer.errors import InputError


@dataclass(frozen=True)
class Reading:
    """What is read of the plan's windows, and by which rank.

    Attributes:
        streams: the features; none for stage 2.
        context: TRs beyond a window, on both sides, whose features are read too.
        anchor: stored predictions, for stage 2.
        part: rank, world and accumulation; its turn is counted by the loader.
    """

    streams: Sequence[Stream]
    scaling: BoldScaling
    context: int = 0
    anchor: Anchors | None = None
    part: Part = field(default_factory=Part)


def training_batches(
    source: Source | DeviceCopy,
    plan: Plan,
    reading: Reading,
    *,
    start: int = 0,
    stop: int | None = None,
    num_workers: int = 0,
    prefetch: int = 2,
    pin: bool = False,
) -> Iterator[Batch]:
    """One rank's micro-batches of the global steps [start, stop), without end where `stop` is None.

    Each step gives `accumulation` batches. Step n is batch n % steps_per_epoch of epoch n // steps_per_epoch.

    Args:
        source: the shards or a copy; a copy on a device needs neither workers nor pinned memory.
        num_workers: processes that read ahead, `prefetch` batches each; 0 reads in this one.
        pin: page-locked batches, for a GPU.

    Raises:
        InputError: the global batch does not divide by ranks and accumulation (at once, not at the first batch); a
            shard cannot be read, here or in a worker.
        RuntimeError: a worker failed or was killed; the message says how.
    """
    turns = reading.part.accumulation
    micro_batches(range(plan.batch_size), reading.part.rank, reading.part.world, turns)
    last = None if stop is None else stop * turns
    positions = itertools.count(start * turns) if last is None else iter(range(start * turns, last))
    if isinstance(source, DeviceCopy):
        return _on_device(source, plan, reading, positions)
    reader = _Reader(source, plan, reading)
    return _in_workers(reader, positions, num_workers, prefetch, pin) if num_workers else _here(reader, positions, pin)


def _windows(plan: Plan, part: Part, position: int) -> list[Window]:
    step, turn = divmod(position, part.accumulation)
    return plan.micro_batch(step, replace(part, turn=turn))


def _on_device(source: DeviceCopy, plan: Plan, reading: Reading, positions: Iterator[int]) -> Iterator[Batch]:
    for position in positions:
        windows = _windows(plan, reading.part, position)
        yield source.batch(windows, reading.streams, plan.sample_length, reading.context, reading.anchor)


class _Reader:
    """Reads the micro-batch at a position into given memory."""

    def __init__(self, source: Source, plan: Plan, reading: Reading) -> None:
        self.source, self.plan, self.reading = source, plan, reading
        self.shape = BatchShape(
            plan.batch_size // (reading.part.world * reading.part.accumulation),
            plan.sample_length + 2 * reading.context,
            tuple(reading.streams),
            len(source.manifest.subjects),
            source.manifest.parcels,
            with_anchor=reading.anchor is not None,
        )

    def read(self, position: int, flat: Tensor) -> Batch:
        """Into (nbytes,) uint8."""
        reading = self.reading
        batch = self.shape.views(flat)
        windows = _windows(self.plan, reading.part, position)
        fill(batch, self.source, windows, reading.streams, reading.scaling, reading.context, reading.anchor)
        return batch


def _here(reader: _Reader, positions: Iterator[int], pin: bool) -> Iterator[Batch]:
    """Read in this process. Used page-locked memory is kept for the next batch by torch itself, other memory here."""
    size = reader.shape.nbytes
    free: list[np.ndarray] = []

    def give_back(buffer: np.ndarray) -> None:
        if len(free) < 2:
            free.append(buffer)

    for position in positions:
        if pin:
            yield reader.read(position, torch.empty(size, dtype=torch.uint8, pin_memory=True))
        else:
            buffer = free.pop() if free else np.empty(size, np.uint8)
            yield reader.read(position, _lent(buffer, partial(give_back, buffer)))


def _lent(buffer: np.ndarray, give_back: Callable[[], None]) -> Tensor:
    """A tensor on a buffer; `give_back` is called when no tensor that shares its memory is left."""
    view = buffer[:]
    weakref.finalize(view, give_back).atexit = False
    return torch.from_numpy(view)


class _Ring:
    """Buffers that this process shares with workers that it will fork."""

    numbers: ClassVar = itertools.count()
    known: ClassVar[weakref.WeakValueDictionary[int, _Ring]] = weakref.WeakValueDictionary()

    def __init__(self, shape: BatchShape, count: int) -> None:
        self.shape = shape
        self._buffers = [np.frombuffer(mmap.mmap(-1, shape.nbytes), np.uint8) for _ in range(count)]
        self._free = list(range(count))
        self.number = next(self.numbers)
        self.known[self.number] = self

    def take(self) -> int | None:
        """A free buffer; None where the training holds on to more batches than there are buffers."""
        return self._free.pop() if self._free else None

    def flat(self, slot: int) -> Tensor:
        """A buffer, for the worker."""
        return torch.from_numpy(self._buffers[slot])

    def batch(self, slot: int) -> Batch:
        """The batch that a worker has read; its buffer is free again when the batch is gone."""
        return self.shape.views(_lent(self._buffers[slot], partial(self._free.append, slot)))


@dataclass
class _Filled:
    """A worker's answer: which buffer it has filled."""

    ring: int
    slot: int

    def pin_memory(self) -> Batch:
        """Called by torch's pinning thread of the training process."""
        return _Ring.known[self.ring].batch(self.slot).pin_memory()


class _Requests(Dataset[object]):
    """Item (position, slot) is the micro-batch at a position, read into that buffer, or into new memory for None."""

    def __init__(self, reader: _Reader, ring: _Ring) -> None:
        self.reader, self.ring = reader, ring

    def __getitem__(self, request: tuple[int, int | None]) -> _Filled | Batch | InputError:
        position, slot = request
        try:
            if slot is None:
                return self.reader.read(position, torch.empty(self.reader.shape.nbytes, dtype=torch.uint8))
            self.reader.read(position, self.ring.flat(slot))
            return _Filled(self.ring.number, slot)
        except InputError as error:
            return error  # torch would wrap it, traceback and all, in another exception


def _in_workers(
    reader: _Reader, positions: Iterator[int], num_workers: int, prefetch: int, pin: bool
) -> Iterator[Batch]:
    """Read in forked workers, in order. Beside what they work on there is one batch in use and one handed over."""
    ring = _Ring(reader.shape, num_workers * prefetch + 2)
    loader = DataLoader(
        _Requests(reader, ring),
        batch_size=None,
        sampler=((position, ring.take()) for position in positions),
        num_workers=num_workers,
        prefetch_factor=prefetch,
        multiprocessing_context="fork",
        pin_memory=pin,
        # of its own: the loader would otherwise draw a seed, which nothing here needs, from the global one
        generator=torch.Generator(),
    )
    before = multiprocessing.active_children()
    answers = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    while True:
        try:
            answer = next(answers, None)
        except RuntimeError as error:
            raise _worker_error(workers, error) from error
        if answer is None:
            return
        if isinstance(answer, InputError):
            raise answer
        yield ring.batch(answer.slot) if isinstance(answer, _Filled) else answer
        del answer  # else this frame would keep a batch that the training has done with


def _worker_error(workers: Sequence[BaseProcess], error: RuntimeError) -> RuntimeError:
    """torch's error, with how the workers that have died did so."""
    dead = [(worker.pid, worker.exitcode) for worker in workers if worker.exitcode]
    if not dead:
        return error
    ends = (
        f"process {pid} {f'was killed by {signal.Signals(-code).name}' if code < 0 else f'exited with status {code}'}"
        for pid, code in dead
    )
    hints = {
        -signal.SIGKILL: " (the system kills what needs too much memory)",
        -signal.SIGBUS: " (a shard was cut short, or its disk failed, while it was read)",
    }
    hint = next((hints[code] for _, code in dead if code in hints), "")
    return RuntimeError(f"data worker died: {', '.join(ends)}{hint}")
