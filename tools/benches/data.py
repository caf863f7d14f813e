"""Reading: windows per second against webdataset and against arrays in memory, the cost of a resume, the plan at scale.

At the published widths, with windows of 64 TRs in batches of 16, in one process with warm page cache.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, default_collate

from tools.benches import Row, against, below, in_turns, seconds
from tools.make_shards import main as make_shards
from trainer.config import Filter
from trainer.data.batches import Batch
from trainer.data.loader import Reading, training_batches
from trainer.data.manifest import BOLD
from trainer.data.plan import Part, Plan, Span, Window, micro_batches, select
from trainer.data.shards import Shards, extension
from trainer.data.statistics import NO_SCALING

WIDTHS = (3072, 1280, 2048, 5120, 1408)
SUBJECTS, PARCELS = 4, 1000
RUNS, TRS = 12, 590
WINDOW, BATCH = 64, 16
REPEATS = 7
LAYOUT = r"""
name: bench
tr: 1.49
subjects: {1: "1", 2: "2", 3: "3", 5: "5"}
series:
  film:
    bold: {file: "bold/{subject}.h5", dataset: "{run}"}
    runs: (?P<film>[a-z]+)(?P<part>\d+)
feature_files: ["features/{model}/{run}.h5"]
features: {s0: {folder: s0}, s1: {folder: s1}, s2: {folder: s2}, s3: {folder: s3}, s4: {folder: s4}}
include_features: [s0/x, s1/x, s2/x, s3/x, s4/x]
"""


def measure(scratch: Path) -> list[Row]:
    """All rows; about 1 GB of scratch is needed while it runs."""
    folder = make_data(scratch)
    return [*reading_rows(folder), *resume_rows(folder), *plan_rows()]


def make_data(scratch: Path) -> Path:
    """Shards of random values, from HDF5 files by the command that users use."""
    rng = np.random.default_rng(0)
    source = scratch / "source"
    for name in ("bold", *(f"features/s{i}" for i in range(len(WIDTHS)))):
        (source / name).mkdir(parents=True)
    (source / "layout.yaml").write_text(LAYOUT)
    for run in range(RUNS):
        n_trs = TRS + run % 5
        for i, width in enumerate(WIDTHS):
            with h5py.File(source / f"features/s{i}/run{run:02d}.h5", "w") as file:
                file["x"] = rng.standard_normal((n_trs, width), np.float32).astype(np.float16)
        for label in ("1", "2", "3", "5"):
            with h5py.File(source / f"bold/{label}.h5", "a") as file:
                file[f"run{run:02d}"] = rng.standard_normal((n_trs, PARCELS), np.float32)
    out = scratch / "shards"
    made = make_shards(["--layout", str(source / "layout.yaml"), "--root", str(source), "--out", str(out)])
    assert made == 0
    return out


def reading_rows(folder: Path) -> list[Row]:
    """Ours, the two others and a plain copy, in turns."""
    shards = Shards(folder)
    plan = Plan(select(shards.manifest, Filter()), 0, WINDOW, 1000 * BATCH, BATCH)
    ours = training_batches(shards, plan, Reading(shards.manifest.streams, NO_SCALING))
    stored = sum(_stored_bytes(next(ours)) for _ in range(3)) // 3
    in_memory = iter(DataLoader(InMemory(shards), batch_size=BATCH, num_workers=0))
    streamed = webdataset_batches(folder)
    copy = plain_copies(shards, stored)
    alone = reads_alone(shards, plan, stored)
    found = in_turns(
        {
            "ours": lambda: _per_second(ours, 20),
            "memory": lambda: _per_second(in_memory, 10),
            "copy": lambda: _per_second(copy, 20),
            "alone": lambda: _per_second(alone, 20),
            "streamed": lambda: _per_second(streamed, 1),
        },
        REPEATS,
    )
    to_gb = stored / BATCH / 1e9
    speed, limit = found["ours"] * to_gb, found["copy"] * to_gb
    fraction, reads = speed / limit, found["alone"] * to_gb
    return [
        against("windows/s, against webdataset .decode() and crop", found["ours"], "1/s", found["streamed"], 5),
        against("windows/s, against float32 arrays in memory", found["ours"], "1/s", found["memory"], 1),
        Row(
            "stored bytes, against a plain memory copy of them", speed, "GB/s", limit, fraction, fraction,
            "ratio >= 0.6", fraction >= 0.6,
        ),
        Row("what os.preadv would reach at most, likewise", reads, "GB/s", limit, reads / limit, reads / limit),
    ]  # fmt: skip


def _per_second(batches: Iterator[Any], count: int) -> float:
    """Windows per second; each batch is dropped before the next one, as a training does."""

    def take() -> None:
        for _ in range(count):
            next(batches)

    return count * BATCH / seconds(take)


def _stored_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in (*batch.features, batch.bold))


def plain_copies(shards: Shards, size: int) -> Iterator[None]:
    """Copies `size` bytes at a time from all over the stored features to one place, in memory touched before."""
    kept = [
        shards.read(i, stream.name, 0, sample.n_trs).view(np.uint8).ravel()
        for i, sample in enumerate(shards.manifest.samples)
        for stream in shards.manifest.streams
    ]
    source, target = np.concatenate(kept), np.ones(size, np.uint8)
    source = np.resize(source, max(len(source), 2 * size))
    for place in itertools.cycle(range(0, len(source) - size, size)):
        np.copyto(target, source[place : place + size])
        yield


def reads_alone(shards: Shards, plan: Plan, size: int) -> Iterator[None]:
    """The plan's reads and nothing else: addresses are known before, one buffer takes them all."""
    target = np.ones(size, np.uint8).data
    files = [os.open(shards.folder / record.name, os.O_RDONLY) for record in shards.manifest.shards]
    steps = [_addresses(shards, plan.batch(0, k)) for k in range(50)]
    for reads in itertools.cycle(steps):
        end = 0
        for shard, offset, count in reads:
            end += os.preadv(files[shard], [target[end : end + count]], offset)
        yield


def _addresses(shards: Shards, windows: Sequence[Window]) -> list[tuple[int, int, int]]:
    """(shard, offset, bytes) of all that some windows hold."""
    found = []
    for window in windows:
        sample = shards.manifest.samples[window.sample]
        for name, place in sample.arrays.items():
            row = math.prod(place.shape[2 if name == BOLD else 1 :]) * np.dtype(place.dtype).itemsize
            for subject in range(len(sample.subjects) if name == BOLD else 1):
                offset = place.offset + (subject * sample.n_trs + window.start) * row
                found.append((sample.shard, offset, len(window) * row))
    return found


class InMemory(IterableDataset[dict[str, Any]]):
    """As the published encoder reads: everything as float32 in memory, one random window of each run in turn."""

    def __init__(self, shards: Shards) -> None:
        manifest = shards.manifest
        self.bold = [shards.read(i, BOLD, 0, s.n_trs) for i, s in enumerate(manifest.samples)]
        self.features = [
            [shards.read(i, stream.name, 0, s.n_trs).astype(np.float32) for stream in manifest.streams]
            for i, s in enumerate(manifest.samples)
        ]
        self.names = [s.run for s in manifest.samples]
        self.rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            for i in self.rng.permutation(len(self.bold)):
                bold = torch.from_numpy(self.bold[i]).float()
                features = [torch.from_numpy(f).float() for f in self.features[i]]
                start = self.rng.integers(0, bold.shape[1] - WINDOW + 1)
                window = slice(start, start + WINDOW)
                yield {
                    "episode": self.names[i],
                    "run": 1,
                    "fmri": bold[:, window],
                    "features": [f[window] for f in features],
                }


def webdataset_batches(folder: Path) -> Iterator[Any]:
    """The same shards as webdataset streams them: every sample decoded, one random window of it kept."""
    rng = np.random.default_rng(0)
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    names = [extension(f"s{i}/x") for i in range(len(WIDTHS))]

    def crop(sample: dict[str, Any]) -> tuple[Any, ...]:
        start = rng.integers(0, sample["bold.npy"].shape[1] - WINDOW + 1)
        window = slice(start, start + WINDOW)
        return (sample["bold.npy"][:, window], *(sample[name][window] for name in names))

    dataset = wds.WebDataset(urls, shardshuffle=False).decode().map(crop).repeat()
    windows = iter(dataset)
    while True:
        yield default_collate(list(itertools.islice(windows, BATCH)))


def resume_rows(folder: Path) -> list[Row]:
    """From the opening of the shards to a batch in the middle of an epoch."""

    def first_batch(windows: int) -> float:
        def resume() -> None:
            with Shards(folder) as shards:
                plan = Plan(select(shards.manifest, Filter()), 0, WINDOW, windows, BATCH)
                reading = Reading(shards.manifest.streams, NO_SCALING)
                next(
                    training_batches(shards, plan, reading, start=7 * plan.steps_per_epoch + plan.steps_per_epoch // 2)
                )

        return seconds(resume)

    found = in_turns({"small": lambda: first_batch(10**3), "large": lambda: first_batch(10**6)}, 2 * REPEATS)
    ratio = found["large"] / found["small"]
    return [
        below("first batch after a resume, 10^3 windows an epoch", found["small"], "s", 0.5),
        below("first batch after a resume, 10^6 windows an epoch", found["large"], "s", 0.5),
        Row(
            "the second against the first", found["large"], "s", found["small"], ratio, None,
            "ratio within 0.8 and 1.25", 0.8 <= ratio <= 1.25,
        ),
    ]  # fmt: skip


def plan_rows(world: int = 1024, windows: int = 10**7) -> list[Row]:
    """A plan for very many, on one rank of them; and what all ranks read together."""
    spans = [Span(i, 0, TRS, (True,) * SUBJECTS) for i in range(300)]
    batch_size = world * BATCH

    def one_rank() -> int:
        plan = Plan(spans, 0, WINDOW, windows, batch_size)
        part = Part(rank=world // 2, world=world)
        return sum(len(plan.micro_batch(step, part)) for step in range(plan.steps_per_epoch))

    time_taken = in_turns({"plan": lambda: seconds(one_rank)}, 3)["plan"]
    tracemalloc.start()
    count = one_rank()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    plan = Plan(spans, 0, WINDOW, windows, batch_size)
    assert count * world == plan.n_windows
    sought = [_timed_seek(plan, step, world) for step in np.random.default_rng(0).integers(0, 10**9, 200)]
    return [
        below(f"plan of an epoch of 10^7 windows, one of {world} ranks", time_taken, "s", 1),
        below("its memory", peak, "MB", 100),
        Row(
            "windows that no rank or two ranks read",
            _misread(plan, world),
            "",
            goal="0",
            met=_misread(plan, world) == 0,
        ),
        below("seeking to a batch", 1e3 * float(np.median(sought)), "ms", 10),
    ]


def _timed_seek(plan: Plan, step: int, world: int) -> float:
    start = time.perf_counter()
    plan.micro_batch(int(step), Part(rank=world - 1, world=world))
    return time.perf_counter() - start


def _misread(plan: Plan, world: int) -> int:
    """How many windows of an epoch are not read exactly once, over all ranks and steps."""
    times = np.zeros(plan.n_windows, np.uint8)
    for k in range(plan.steps_per_epoch):
        numbers = range(k * plan.batch_size, (k + 1) * plan.batch_size)
        for rank in range(world):
            (mine,) = micro_batches(numbers, rank, world)
            times[mine.start : mine.stop] += 1  # type: ignore[attr-defined]
    return int((times != 1).sum())
