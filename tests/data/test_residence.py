"""Device, host and disk give the same batches to the bit; a copy is made once for all processes, and leaves nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.queues import Queue
from pathlib import Path
from subprocess import PIPE

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import PARCELS, Invented
from tests.pipes import line
from tools.make_shards import main
from trainer.config import Filter
from trainer.data import sharing
from trainer.data.batches import Batch
from trainer.data.loader import Reading, training_batches
from trainer.data.manifest import BOLD
from trainer.data.plan import Plan, Span, select
from trainer.data.predictions import StoredPredictions
from trainer.data.residence import DeviceCopy, HostCopy, choose, extents, free_memory, reside, size_of
from trainer.data.shards import Shards
from trainer.data.sharing import SharedMemory, is_shared
from trainer.data.statistics import BoldScaling
from trainer.errors import InputError

CPU = torch.device("cpu")
GB = 10**9


def equal(one: Batch, other: Batch) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        single = [batch.bold, batch.mask, batch.loss_mask, batch.subject_mask, batch.windows]
        return [*batch.features, *single, *([] if batch.anchor is None else [batch.anchor])]

    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def anchors_of(shards: Shards, spans: Sequence[Span]) -> dict[int, np.ndarray]:
    """Predictions inside the spans only."""
    rng = np.random.default_rng(1)
    made = {}
    for span in spans:
        n_trs = shards.manifest.samples[span.sample].n_trs
        made[span.sample] = np.full((3, n_trs, PARCELS), np.nan, np.float32)
        made[span.sample][:, span.start : span.stop] = rng.normal(size=(3, len(span), PARCELS))
    return made


@settings(max_examples=25, deadline=None)
@given(
    trs=st.sampled_from([[None, None], [3, -2], [8, 15], [None, 12]]),
    subjects=st.sampled_from([None, ["a"], ["b", "3"]]),
    mode=st.sampled_from(["none", "run", "subject"]),
    context=st.integers(0, 9),
    with_anchor=st.booleans(),
    length=st.integers(1, 26),
)
def test_device_host_and_disk_give_the_same_batches(
    invented_shards: Shards,
    trs: list[int | None],
    subjects: list[str] | None,
    mode: str,
    context: int,
    with_anchor: bool,
    length: int,
) -> None:
    streams = invented_shards.manifest.streams
    spans = select(invented_shards.manifest, Filter(trs=trs, subjects=subjects))
    scaling = BoldScaling.fit(mode, invented_shards, spans)  # type: ignore[arg-type]
    needed = extents(spans, invented_shards.manifest, context)
    copies = [
        HostCopy(invented_shards, needed, streams),
        DeviceCopy(invented_shards, needed, streams, scaling, CPU),
    ]
    anchor = anchors_of(invented_shards, spans) if with_anchor else None
    reading = Reading(streams, scaling, context=context, anchor=anchor)
    plan = Plan(spans, 5, length, 40, 8)
    disk = list(training_batches(invented_shards, plan, reading, stop=5))
    for copy in copies:
        for batch, expected in zip(training_batches(copy, plan, reading, stop=5), disk, strict=True):
            assert equal(batch, expected)


@pytest.mark.parametrize("mode", ["none", "run", "subject"])
def test_a_device_scales_each_subject_by_its_own_though_one_before_it_is_absent(
    invented: Invented, tmp_path: Path, mode: str
) -> None:
    with h5py.File(invented.bold_file("a"), "a") as file:
        for day in list(file):
            if "alpha_1" in file[day]:
                del file[day]
    assert main(invented.arguments(tmp_path / "s")) == 0
    shards = Shards(tmp_path / "s")
    spans = select(shards.manifest, Filter())
    scaling = BoldScaling.fit(mode, shards, spans)  # type: ignore[arg-type]
    anchor = anchors_of(shards, spans)
    copy = DeviceCopy(shards, extents(spans, shards.manifest, 0), [], scaling, CPU)
    plan, reading = Plan(spans, 1, 12, 16, 4), Reading([], scaling, anchor=anchor)
    assert all(
        map(equal, training_batches(copy, plan, reading, stop=4), training_batches(shards, plan, reading, stop=4))
    )


def test_predictions_that_are_missing_raise_wherever_the_data_stand(invented_shards: Shards, tmp_path: Path) -> None:
    manifest = invented_shards.manifest
    spans = select(manifest, Filter())
    for sample, values in anchors_of(invented_shards, spans[:-1]).items():
        np.save(tmp_path / f"{manifest.samples[sample].key}.npy", values)
    anchor = StoredPredictions(tmp_path, manifest, manifest.streams)
    scaling = BoldScaling("none")
    needed = extents(spans, manifest, 0)
    plan, reading = Plan(spans, 1, 12, 16, 4), Reading([], scaling, anchor=anchor)
    missing = f"{manifest.samples[spans[-1].sample].key}.npy: missing"
    for source in (
        invented_shards,
        HostCopy(invented_shards, needed, []),
        DeviceCopy(invented_shards, needed, [], scaling, CPU),
    ):
        with pytest.raises(InputError, match=missing):
            list(training_batches(source, plan, reading, stop=4))


@pytest.mark.parametrize("axis", [["3", "a"], ["x", "b"]])
def test_copies_are_on_the_subject_axis_of_the_model(invented_folder: Path, axis: list[str]) -> None:
    shards = Shards(invented_folder, subjects=axis)
    spans = select(shards.manifest, Filter())
    scaling = BoldScaling.fit("subject", shards, spans)
    streams, needed = shards.manifest.streams, extents(spans, shards.manifest, 0)
    plan, reading = Plan(spans, 1, 12, 16, 4), Reading(streams, scaling)
    disk = list(training_batches(shards, plan, reading, stop=4))
    for copy in (HostCopy(shards, needed, streams), DeviceCopy(shards, needed, streams, scaling, CPU)):
        assert all(map(equal, training_batches(copy, plan, reading, stop=4), disk))
    whole = Shards(invented_folder)
    window = plan.batch(0, 0)[0]
    label = axis[1]
    row = whole.manifest.samples[window.sample].subjects.index(label)
    bold = whole.read(window.sample, BOLD, window.start, window.stop, row=row)
    scale = BoldScaling.fit("subject", whole, select(whole.manifest, Filter()))
    scale.apply(bold, window.sample, whole.manifest.subjects.index(label))
    np.testing.assert_array_equal(disk[0].bold[0, 1, : len(bold)].numpy(), bold)


def test_a_copy_on_the_host_serves_workers_and_reads_the_rest_from_disk(invented_shards: Shards) -> None:
    spans = select(invented_shards.manifest, Filter(runs=["alpha_1"]))
    streams = invented_shards.manifest.streams
    copy = HostCopy(invented_shards, extents(spans, invented_shards.manifest, 0), streams[:1])
    every = select(invented_shards.manifest, Filter())
    plan, reading = Plan(every, 5, 10, 40, 8), Reading(streams, BoldScaling("none"))
    batches = list(training_batches(copy, plan, reading, stop=5, num_workers=2))
    assert all(map(equal, batches, training_batches(invented_shards, plan, reading, stop=5)))


def test_what_a_copy_needs_is_the_spans_with_context_inside_their_runs(invented_shards: Shards) -> None:
    manifest = invented_shards.manifest
    spans = [Span(0, 4, 9, (True,) * 3), Span(0, 20, 25, (True,) * 3), Span(2, 1, 20, (True,) * 3)]
    assert extents(spans, manifest, 3) == {0: (1, 28), 2: (0, 20)}
    row = 4 * 2 + 6 * 2 + 5 * 4
    assert size_of({0: (1, 28), 1: (0, 24)}, manifest, manifest.streams) == (
        27 * (row + 3 * PARCELS * 4) + 24 * (row + 2 * PARCELS * 4)
    )


@pytest.mark.parametrize(
    ("wanted", "size", "device", "host", "place"),
    [
        ("auto", 10, 20, 0, "device"),
        ("auto", 11, 20, 22, "host"),
        ("auto", 11, 20, 21, "disk"),
        ("auto", 10, None, 20, "host"),
        ("auto", 11, None, 20, "disk"),
        ("disk", 1, 100, 100, "disk"),
        ("host", 20, 0, 20, "host"),
        ("device", 20, 20, 0, "device"),
        ("device", 20, None, 20, "device"),
    ],
)
def test_auto_takes_the_first_with_room_to_spare(
    wanted: str, size: int, device: int | None, host: int, place: str
) -> None:
    found, why = choose(wanted, size * GB, None if device is None else device * GB, host * GB)
    assert found == place
    assert f"{size}.0 GB" in why


@pytest.mark.parametrize(("wanted", "device", "host"), [("host", 99, 9), ("device", 9, 99), ("device", None, 9)])
def test_a_place_that_is_asked_for_and_too_small_is_refused(wanted: str, device: int | None, host: int) -> None:
    with pytest.raises(InputError, match=r"data.residence: too little free memory .* found 9.0 GB, .* the 10.0 GB"):
        choose(wanted, 10 * GB, None if device is None else device * GB, host * GB)


def test_it_says_in_one_line_where_the_data_stand(invented_shards: Shards) -> None:
    needed = {0: (0, 30)}
    streams = invented_shards.manifest.streams
    kinds = {"device": DeviceCopy, "host": HostCopy, "disk": Shards, "auto": HostCopy}
    for wanted, kind in kinds.items():
        source, line = reside(wanted, invented_shards, needed, streams, BoldScaling("none"), CPU)
        assert isinstance(source, kind)
        assert line.startswith(f"data.residence: {wanted if wanted != 'auto' else 'host'} (") and "\n" not in line
    on_device, host = free_memory(CPU)
    assert on_device is None and host > 0


def _take(name: str, answers: Queue[tuple[bool, bool, int]], wait: float = 0.0) -> None:
    def fill(memory: np.ndarray) -> None:
        time.sleep(0.3)
        memory[:] = 7

    shared = SharedMemory(name, 1000, fill)
    answers.put((shared.filled_here, bool((shared.array == 7).all()), os.getpid()))
    time.sleep(wait)


def test_processes_of_a_node_share_one_copy_that_no_crash_leaves_behind() -> None:
    context = multiprocessing.get_context("spawn")
    name, answers = f"test-{os.getpid()}", context.Queue()
    processes = [context.Process(target=_take, args=(name, answers, 60)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    assert sorted(filled for filled, _, _ in found) == [False, False, True]
    assert all(whole for _, whole, _ in found)
    assert is_shared(name)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(timeout=30)
    assert not is_shared(name)
    assert not list(Path("/dev/shm").glob("*fmri*"))


def test_a_copy_that_fails_is_tried_by_the_next_and_ends_with_its_owner() -> None:
    name = f"test-fail-{os.getpid()}"

    def broken(memory: np.ndarray) -> None:
        raise InputError("shard", "cannot be read")

    with pytest.raises(InputError):
        SharedMemory(name, 10, broken)
    assert not is_shared(name)
    shared = SharedMemory(name, 10, lambda memory: memory.fill(3))
    assert shared.filled_here and is_shared(name) and not shared.array.flags.writeable
    again = SharedMemory(name, 10, broken)
    assert not again.filled_here and again.array.tolist() == [3] * 10
    del shared
    gc.collect()
    assert not is_shared(name)
    assert again.array.tolist() == [3] * 10


def test_waiting_for_another_process_is_bounded_and_says_for_whom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"test-wait-{os.getpid()}"
    silent = sharing._bind(sharing._address(name))
    assert silent is not None
    monkeypatch.setattr(sharing, "PATIENCE_S", 0.3)
    monkeypatch.setattr(sharing, "ANSWER_S", 0.1)
    process = f"process {os.getpid()} on {platform.node()}"
    with silent, pytest.raises(InputError, match=rf"{process}, which copies .* has not finished"):
        SharedMemory(name, 10, lambda memory: None)
    assert capsys.readouterr().out.count(f"data.residence: waiting for {process}, which copies the same data") == 1


OWNER = """
import sys
from trainer.data.sharing import SharedMemory

def fill(memory):
    memory[:] = 7
    if sys.argv[2] == "filling":
        print("there", flush=True)
        sys.stdin.readline()

shared = SharedMemory(sys.argv[1], 10, fill)
print("there", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("when", ["filling", "serving"])
def test_who_is_stopped_is_passed_over_by_all_others_to_one_copy_of_theirs(
    when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"test-stopped-{when}-{os.getpid()}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", OWNER, name, when]
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True) as owner:
        try:
            assert line(owner) == "there" and is_shared(name)
            owner.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, owner.pid, os.WSTOPPED)
            assert not is_shared(name)
            monkeypatch.setattr(sharing, "ANSWER_S", 0.1)
            mine = SharedMemory(name, 10, lambda memory: memory.fill(3))
            assert f"process {owner.pid} on {platform.node()}, which has the same data" in capsys.readouterr().out
            assert mine.filled_here and is_shared(name)
            again = SharedMemory(name, 10, lambda memory: memory.fill(4))
            assert not again.filled_here and again.array.tolist() == [3] * 10
        finally:
            owner.kill()
