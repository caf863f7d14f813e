"""Batches hold the source's values where their masks say so, zeros elsewhere, and what is absent is never read."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import PARCELS, Invented, write_shards
from trainer.config import Filter
from trainer.data import loader
from trainer.data.batches import Batch, BatchShape, make_batch, whole_runs
from trainer.data.loader import Reading, training_batches
from trainer.data.manifest import Stream
from trainer.data.plan import Part, Plan, Span, Window, select
from trainer.data.shards import SampleContent, Shards
from trainer.data.statistics import NO_SCALING, BoldScaling, bold_statistics, feature_statistics
from trainer.errors import InputError

ALL = (True, True, True)


def _equal(one: Batch, other: Batch) -> bool:
    pairs = [*zip(one.features, other.features, strict=True), (one.bold, other.bold), (one.mask, other.mask)]
    pairs += [(one.subject_mask, other.subject_mask), (one.windows, other.windows), (one.loss_mask, other.loss_mask)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_batch_holds_slices_of_the_source(invented_shards: Shards, invented_source: Invented) -> None:
    windows = [Window(5, 0, 3, 11, ALL), Window(9, 1, 0, 8, (True, True, False)), Window(2, 3, 12, 20, ALL)]
    batch = make_batch(invented_shards, windows, invented_shards.manifest.streams)
    assert [tuple(f.shape) for f in batch.features] == [(3, 8, 4), (3, 8, 2, 3), (3, 8, 5)]
    assert [f.dtype for f in batch.features] == [torch.float16, torch.float16, torch.float32]
    assert batch.bold.shape == (3, 3, 8, PARCELS) and batch.bold.dtype == torch.float32
    assert batch.windows.tolist() == [5, 9, 2] and batch.windows.dtype == torch.int64
    assert batch.mask.all() and batch.anchor is None
    for i, window in enumerate(windows):
        sample = invented_shards.manifest.samples[window.sample]
        for s, label in enumerate(("a", "b", "3")):
            if label in sample.subjects:
                source = invented_source.bold[sample.run, sample.repeat, label][window.start : window.stop]
                np.testing.assert_array_equal(batch.bold[i, s].numpy(), source)
        video = invented_source.features[sample.run, "Video"][window.start : window.stop]
        np.testing.assert_array_equal(batch.features[1][i].numpy(), video.astype(np.float16))


def test_short_window_is_padded_with_zeros_behind_a_mask(invented_shards: Shards) -> None:
    batch = make_batch(invented_shards, [Window(0, 0, 25, 30, ALL)], invented_shards.manifest.streams, sample_length=12)
    assert batch.mask[0].tolist() == [True] * 5 + [False] * 7
    for tensor in (*batch.features, batch.bold.transpose(1, 2)):
        assert not tensor[0, 5:].any() and tensor[0, :5].any()


def test_absent_and_unused_subjects_are_not_read(invented_shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int | None] = []
    original = Shards.read

    def counted(self: Shards, sample: int, name: str, *args: object, row: int | None = None) -> np.ndarray:
        rows.append(row)
        assert row is not None
        return original(self, sample, name, *args, row=row)  # type: ignore[arg-type]

    monkeypatch.setattr(Shards, "read", counted)
    windows = [Window(0, 1, 0, 8, (True, True, False)), Window(1, 0, 0, 8, (False, False, True))]
    batch = make_batch(invented_shards, windows, [])
    assert rows == [0, 1, 2]
    assert batch.subject_mask.tolist() == [[True, True, False], [False, False, True]]
    assert not batch.bold[0, 2].any() and not batch.bold[1, :2].any() and batch.bold[1, 2].any()


def test_present_subject_is_found_though_one_before_it_is_absent(invented: Invented, tmp_path: Path) -> None:
    import h5py

    from tools.make_shards import main

    with h5py.File(invented.bold_file("a"), "a") as file:
        for day in list(file):
            if "alpha_1" in file[day]:
                del file[day]
    assert main(invented.arguments(tmp_path / "s")) == 0
    shards = Shards(tmp_path / "s")
    (batch,) = whole_runs(shards, select(shards.manifest, Filter(runs=["alpha_1"])), [])
    assert batch.subject_mask.tolist() == [[False, True, True]]
    np.testing.assert_array_equal(batch.bold[0, 2].numpy(), invented.bold["alpha_1", 1, "3"][: batch.bold.shape[2]])


def test_no_streams_still_gives_bold_and_anchor(invented_shards: Shards) -> None:
    anchor = {1: np.arange(3 * 24 * PARCELS, dtype=np.float32).reshape(3, 24, PARCELS)}
    anchor[1][2] = np.nan
    window = Window(0, 1, 4, 10, (True, True, False))
    batch = make_batch(invented_shards, [window], [], sample_length=8, anchor=anchor)
    assert batch.features == [] and batch.anchor is not None
    np.testing.assert_array_equal(batch.anchor[0, :2, :6].numpy(), anchor[1][:2, 4:10])
    assert not batch.anchor[0, 2].any() and not batch.anchor[0, :, 6:].any()


def _plan(shards: Shards, length: int = 22) -> Plan:
    return Plan(select(shards.manifest, Filter()), 11, length, 24, 4)


def _read(shards: Shards, plan: Plan, *, streams: bool = True, part: Part = Part(), **options: Any) -> Iterator[Batch]:  # noqa: B008
    reading = Reading(shards.manifest.streams if streams else [], NO_SCALING, part=part)
    return training_batches(shards, plan, reading, **options)


def _joined(parts: Sequence[Batch]) -> Batch:
    names = ("bold", "mask", "loss_mask", "subject_mask", "windows")
    features = [torch.cat(tensors) for tensors in zip(*(p.features for p in parts), strict=True)]
    return Batch(features, *(torch.cat([getattr(p, n) for p in parts]) for n in names))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_ranks_and_their_micro_batches_together_are_the_global_batch(
    invented_shards: Shards, world: int, accumulation: int
) -> None:
    plan = _plan(invented_shards)
    whole = list(_read(invented_shards, plan, start=18, stop=24))
    assert len(whole) == plan.steps_per_epoch == 6
    ranks = [
        list(_read(invented_shards, plan, start=18, stop=24, part=Part(rank, world, accumulation)))
        for rank in range(world)
    ]
    for k, batch in enumerate(whole):
        turns = slice(k * accumulation, (k + 1) * accumulation)
        assert _equal(_joined([part for rank in ranks for part in rank[turns]]), batch)


@settings(max_examples=6, deadline=None)
@given(
    start=st.integers(0, 13),
    workers=st.integers(0, 2),
    prefetch=st.integers(1, 3),
    accumulation=st.sampled_from([1, 2]),
)
def test_a_start_anywhere_and_any_workers_give_the_same_tail(
    invented_shards: Shards, start: int, workers: int, prefetch: int, accumulation: int
) -> None:
    plan, part = _plan(invented_shards), Part(accumulation=accumulation)
    whole = list(_read(invented_shards, plan, part=part, stop=14))
    tail = _read(invented_shards, plan, part=part, start=start, stop=14, num_workers=workers, prefetch=prefetch)
    for batch, expected in zip(tail, whole[start * accumulation :], strict=True):
        assert _equal(batch, expected)


def test_workers_live_on_through_epochs_without_end(invented_shards: Shards) -> None:
    plan = _plan(invented_shards)
    batches = _read(invented_shards, plan, num_workers=1)
    next(batches)
    before = set(multiprocessing.active_children())
    for expected in _read(invented_shards, plan, start=1, stop=3 * plan.steps_per_epoch):
        assert _equal(next(batches), expected)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_buffers_are_used_again_but_never_while_a_batch_is_held(invented_shards: Shards, workers: int) -> None:
    plan = _plan(invented_shards)
    expected = list(_read(invented_shards, plan, stop=12))
    held = list(_read(invented_shards, plan, stop=12, num_workers=workers))
    assert all(map(_equal, held, expected))
    kept, places = [], set()
    for batch in _read(invented_shards, plan, stop=12, num_workers=workers):
        kept.append(batch.features[0][1, 2:3])
        places.add(batch.bold.data_ptr())
    assert len(places) >= 12  # a view of one TR is enough to keep a buffer
    assert all(torch.equal(k, e.features[0][1, 2:3]) for k, e in zip(kept, expected, strict=True))
    used = [batch.bold.data_ptr() for batch in _read(invented_shards, plan, stop=12, num_workers=workers)]
    assert len(set(used)) <= 2 + 2 * workers


def test_reused_buffers_hold_zeros_where_nothing_is_read(invented_shards: Shards) -> None:
    spans = [Span(0, 0, 30, ALL), Span(1, 3, 10, (True, False, False))]
    plan = Plan(spans, 2, 24, 64, 1)
    batches = _read(invented_shards, plan, stop=64)
    for k, batch in enumerate(batches):
        assert _equal(
            batch, make_batch(invented_shards, plan.batch(0, k), invented_shards.manifest.streams, sample_length=24)
        )


def test_a_killed_worker_ends_the_training_with_its_signal(invented_shards: Shards) -> None:
    with _time_limit(60), pytest.raises(RuntimeError, match=r"killed by (SIGKILL|signal: Killed)"):
        for _ in _read(invented_shards, _plan(invented_shards), num_workers=2):
            for worker in multiprocessing.active_children():
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_is_named_by_here_and_by_workers(
    invented_folder: Path, tmp_path: Path, workers: int
) -> None:
    shutil.copytree(invented_folder, tmp_path / "copy")
    shards = Shards(tmp_path / "copy")
    for tar in (tmp_path / "copy").glob("*.tar"):
        tar.unlink()
    with _time_limit(60), pytest.raises(InputError, match=r"shard-00000\.tar: cannot be read: No such file"):
        next(_read(shards, _plan(shards), num_workers=workers))


def test_a_worker_that_fails_tells_what_happened(invented_shards: Shards) -> None:
    class Broken(dict[int, np.ndarray]):
        def __getitem__(self, sample: int) -> np.ndarray:
            raise ZeroDivisionError("of no use")

    reading = Reading([], NO_SCALING, anchor=Broken())
    with _time_limit(60), pytest.raises(ZeroDivisionError, match="of no use"):
        next(training_batches(invented_shards, _plan(invented_shards), reading, num_workers=1))


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """A hang becomes a failure."""

    def late(*_: object) -> None:
        raise TimeoutError(f"nothing came for {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_pinning_takes_the_batch_out_of_the_ring(invented_shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    plan = _plan(invented_shards)
    (expected,) = _read(invented_shards, plan, stop=1)
    ring = loader._Ring(BatchShape(4, 22, invented_shards.manifest.streams, 3, PARCELS), 2)
    slot = ring.take()
    assert slot is not None
    ring.shape.views(ring.flat(slot)).bold.copy_(expected.bold)
    pinned = pickle.loads(pickle.dumps(loader._Filled(ring.number, slot))).pin_memory()
    assert torch.equal(pinned.bold, expected.bold)
    assert {ring.take(), ring.take()} == {0, 1} and ring.take() is None


def test_reading_leaves_the_global_generator_alone(invented_shards: Shards) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(_read(invented_shards, _plan(invented_shards), num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_longer_than_a_run_take_it_whole(invented_shards: Shards) -> None:
    for batch in _read(invented_shards, _plan(invented_shards, 28), streams=False, stop=6):
        assert batch.mask.shape[1] == 28
        assert set(batch.mask.sum(1).tolist()) <= {28, 24, 20}


@pytest.mark.parametrize(
    ("part", "fitting"), [(Part(world=3), "1, 2, 4 processes"), (Part(world=4, accumulation=2), "1, 2 processes")]
)
def test_world_that_does_not_divide_is_refused_at_once(invented_shards: Shards, part: Part, fitting: str) -> None:
    with pytest.raises(InputError, match=fitting):
        _read(invented_shards, _plan(invented_shards), part=part)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from trainer.config import Filter
from trainer.data.loader import Reading, training_batches
from trainer.data.plan import Plan, select
from trainer.data.shards import SampleContent, Shards
from trainer.data.statistics import NO_SCALING

def used():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) for key in ("VmData", "RssAnon")]

shards = Shards(sys.argv[1])
plan = Plan(select(shards.manifest, Filter()), 0, 64, 2000, 16)
reading = Reading(shards.manifest.streams, NO_SCALING)
before = used()
read = 0
for batch in training_batches(shards, plan, reading, stop=20):
    read += batch.features[0].nbytes
assert read > 2 * sum(s.size for s in shards.manifest.shards)
print(*(b - a for a, b in zip(before, used())), batch.features[0].nbytes // 1024)
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    width = 16_000
    rows = np.random.default_rng(0).standard_normal((500, width)).astype(np.float16)
    samples = [SampleContent(f"r{i}", {}, {"bold": np.zeros((1, 500, 4), np.float32), "a/b": rows}) for i in range(19)]
    write_shards(tmp_path, samples, ["x"], 4, [Stream("a/b", 1, width, "float16")])
    del samples
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    data, anonymous, batch = map(int, output.split())
    assert batch > 30_000
    assert data - 2 * batch < 100_000 and anonymous - 2 * batch < 100_000


def test_whole_runs_come_in_order_each_in_full(invented_shards: Shards) -> None:
    spans = select(invented_shards.manifest, Filter(trs=[2, None]))
    batches = list(whole_runs(invented_shards, spans, invented_shards.manifest.streams))
    assert [b.bold.shape[2] for b in batches] == [28, 22, 18, 18]
    assert [b.windows.tolist() for b in batches] == [[0], [1], [2], [3]]
    np.testing.assert_array_equal(batches[1].bold[0, :2].numpy(), invented_shards.read(1, "bold", 2, 24))


@pytest.mark.parametrize("trs", [None, [3, -4], [None, 21], [4, None]])
def test_feature_statistics_equal_numpy_over_the_filtered_trs(invented_shards: Shards, trs: list | None) -> None:
    spans, streams = select(invented_shards.manifest, Filter(trs=trs)), invented_shards.manifest.streams
    means, scales = feature_statistics(invented_shards, spans, streams)
    for stream, mean, scale in zip(streams, means, scales, strict=True):
        rows = np.concatenate([invented_shards.read(s.sample, stream.name, s.start, s.stop) for s in spans])
        rows = rows.astype(np.float64).reshape(-1, stream.width)
        assert mean.shape == scale.shape == (stream.width,) and mean.dtype == torch.float32
        np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(scale.numpy(), rows.std(0), rtol=1e-6)


def test_whole_runs_take_their_statistics_from_the_manifest(
    invented_shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int, int]] = []
    original = Shards.read

    def counted(self: Shards, sample: int, name: str, start: int, stop: int, *a: object, **k: object) -> np.ndarray:
        read.append((sample, start, stop))
        return original(self, sample, name, start, stop, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(Shards, "read", counted)
    spans = select(invented_shards.manifest, Filter(trs=[None, 24]))
    feature_statistics(invented_shards, spans, invented_shards.manifest.streams[:1])
    assert read == [(0, 0, 24)]


@pytest.mark.parametrize(
    "keys", [{}, {"trs": [3, -4]}, {"trs": [5, None]}, {"subjects": ["b", "3"]}, {"subjects": ["a"], "trs": [1, 9]}]
)
def test_bold_statistics_count_used_subjects_only(invented_shards: Shards, keys: dict) -> None:
    spans = select(invented_shards.manifest, Filter(**keys))
    count, mean, std = bold_statistics(invented_shards, spans)
    for s, label in enumerate(invented_shards.manifest.subjects):
        rows = [
            invented_shards.read(span.sample, "bold", span.start, span.stop)[
                invented_shards.manifest.samples[span.sample].subjects.index(label)
            ]
            for span in spans
            if span.subjects[s]
        ]
        if not rows:
            assert count[s] == 0 and not mean[s].any() and not std[s].any()
            continue
        union = np.concatenate(rows).astype(np.float64)
        assert count[s] == len(union)
        np.testing.assert_allclose(mean[s], union.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std[s], union.std(0), rtol=1e-12)


def test_bold_scaled_by_run_has_mean_0_and_deviation_1_in_each_run(invented_shards: Shards) -> None:
    spans = select(invented_shards.manifest, Filter())
    scaling = BoldScaling.fit("run", invented_shards, spans)
    for batch in whole_runs(invented_shards, spans, [], scaling):
        used = batch.bold[batch.subject_mask].double()
        torch.testing.assert_close(used.mean(1), torch.zeros_like(used[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(used.std(1, correction=0), torch.ones_like(used[:, 0]), atol=1e-5, rtol=0)
        assert not batch.bold[~batch.subject_mask].any()


def test_bold_scaled_by_subject_uses_the_training_trs(invented_shards: Shards) -> None:
    training = select(invented_shards.manifest, Filter(films=["alpha"], trs=[None, 20]))
    scaling = BoldScaling.fit("subject", invented_shards, training)
    _, mean, std = bold_statistics(invented_shards, training)
    window = Window(0, 2, 5, 15, ALL)
    batch = make_batch(invented_shards, [window], [], scaling)
    expected = (invented_shards.read(2, "bold", 5, 15) - mean[:, None]) / std[:, None]
    np.testing.assert_allclose(batch.bold[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_vary_is_divided_by_1(invented: Invented, tmp_path: Path) -> None:
    import h5py

    from tools.make_shards import main

    values = invented.features["alpha_1", "Text"].copy()
    values[:, 1] = 1000.0
    invented.put_features("Text", "alpha_1", "embedding", values)
    bold = invented.bold["alpha_1", 1, "a"].copy()
    bold[:, 3] = 0.1
    with h5py.File(invented.bold_file("a"), "a") as file:
        for day in file:
            if "alpha_1" in file[day]:
                file[day]["alpha_1"][...] = bold
    assert main(invented.arguments(tmp_path / "s")) == 0
    shards = Shards(tmp_path / "s")
    spans = select(shards.manifest, Filter(runs=["alpha_1"]))
    for chosen in (spans, [replace(spans[0], stop=17)]):
        (mean,), (scale,) = feature_statistics(shards, chosen, shards.manifest.streams[:1])
        assert (mean[1], scale[1]) == (1000.0, 1.0) and scale[0] != 1
        for mode in ("run", "subject"):
            scaling = BoldScaling.fit(mode, shards, chosen)  # type: ignore[arg-type]
            (batch,) = whole_runs(shards, spans, [], scaling)
            assert not batch.bold[0, 0, :, 3].any() and batch.bold.isfinite().all()


def test_batch_moves_as_a_whole(invented_shards: Shards) -> None:
    spans = [Span(0, 0, 5, ALL)]
    anchor = {0: np.zeros((3, 30, PARCELS), np.float32)}
    (batch,) = whole_runs(invented_shards, spans, invented_shards.manifest.streams, anchor=anchor)
    moved = batch.to("meta")
    tensors = [*moved.features, moved.bold, moved.mask, moved.subject_mask, moved.windows, moved.anchor]
    assert all(t is not None and t.device.type == "meta" for t in tensors)


def test_song8_through_the_loader(shared: Path, tmp_path: Path) -> None:
    from tools.make_shards import main

    layout = Path(__file__).resolve().parents[2] / "configs/datasets/song8.yaml"
    assert main(["--layout", str(layout), "--root", str(shared / "data/song8"), "--out", str(tmp_path / "s")]) == 0
    shards = Shards(tmp_path / "s")
    training = select(shards.manifest, Filter(runs=["sitcomep1"], trs=[0, -300]))
    assert [(s.start, s.stop) for s in training] == [(0, 1186)]
    _, (scale,) = feature_statistics(shards, training, shards.manifest.streams)
    rows = shards.read(0, "pc100/pc", 0, 1186).astype(np.float64)
    np.testing.assert_allclose(scale.numpy(), rows.std(0), rtol=1e-6)
    count, bold_mean, bold_std = bold_statistics(shards, select(shards.manifest, Filter(runs=["sitcomep2"])))
    assert count.tolist() == [1465] * 8
    assert np.abs(bold_mean).max() < 0.01 and np.abs(bold_std - 1).max() < 0.01
    batch = next(_read(shards, Plan(training, 0, 64, 32, 16)))
    assert batch.features[0].shape == (16, 64, 100) and batch.bold.shape == (16, 8, 64, 200)
