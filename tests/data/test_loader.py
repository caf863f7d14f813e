"""Batches hold the source's values where their masks say so, zeros elsewhere, and what is absent is never read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.conftest import PARCELS, Invented
from trainer.config import Filter
from trainer.data.loader import (
    NO_SCALING,
    Batch,
    BoldScaling,
    bold_statistics,
    feature_statistics,
    make_batch,
    training_batches,
    whole_runs,
)
from trainer.data.plan import Plan, Span, Window, select
from trainer.data.shards import Shards
from trainer.errors import InputError

ALL = (True, True, True)


def _equal(one: Batch, other: Batch) -> bool:
    pairs = [*zip(one.features, other.features, strict=True), (one.bold, other.bold), (one.mask, other.mask)]
    pairs += [(one.subject_mask, other.subject_mask), (one.windows, other.windows)]
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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_global_batch(invented_shards: Shards, world: int) -> None:
    plan, streams = _plan(invented_shards), invented_shards.manifest.streams
    whole = list(training_batches(invented_shards, plan, streams, NO_SCALING, 3))
    assert len(whole) == plan.steps_per_epoch == 6
    parts = [
        list(training_batches(invented_shards, plan, streams, NO_SCALING, 3, rank=r, world=world)) for r in range(world)
    ]
    for k, batch in enumerate(whole):
        joined = Batch(
            [torch.cat([p[k].features[i] for p in parts]) for i in range(3)],
            *(torch.cat([getattr(p[k], n) for p in parts]) for n in ("bold", "mask", "subject_mask", "windows")),
        )
        assert _equal(joined, batch)


def test_starting_late_and_reading_in_workers_change_nothing(invented_shards: Shards) -> None:
    plan, streams = _plan(invented_shards), invented_shards.manifest.streams
    whole = list(training_batches(invented_shards, plan, streams, NO_SCALING, 1))
    late = list(training_batches(invented_shards, plan, streams, NO_SCALING, 1, start=4))
    workers = list(training_batches(invented_shards, plan, streams, NO_SCALING, 1, num_workers=2))
    assert len(late) == 2 and all(map(_equal, late, whole[4:]))
    assert len(workers) == 6 and all(map(_equal, workers, whole))


def test_reading_leaves_the_global_generator_alone(invented_shards: Shards) -> None:
    before = torch.get_rng_state()
    next(training_batches(invented_shards, _plan(invented_shards), [], NO_SCALING, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_longer_than_a_run_take_it_whole(invented_shards: Shards) -> None:
    for batch in training_batches(invented_shards, _plan(invented_shards, 28), [], NO_SCALING, 0):
        assert batch.mask.shape[1] == 28
        assert set(batch.mask.sum(1).tolist()) <= {28, 24, 20}


def test_world_that_does_not_divide_is_refused_at_once(invented_shards: Shards) -> None:
    with pytest.raises(InputError, match="1, 2, 4 processes"):
        training_batches(invented_shards, _plan(invented_shards), [], NO_SCALING, 0, world=3)


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
    batch = next(training_batches(shards, Plan(training, 0, 64, 32, 16), shards.manifest.streams, NO_SCALING, 0))
    assert batch.features[0].shape == (16, 64, 100) and batch.bold.shape == (16, 8, 64, 200)
