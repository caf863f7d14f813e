"""The benchmark of reading runs through, says what it measured, and what it measures against does what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools import bench, benches
from tools.benches import data, watch
from trainer.config import Filter
from trainer.data.plan import Plan, select
from trainer.data.shards import Shards


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of kilobytes."""
    for name, value in {
        "WIDTHS": (8, 4, 4, 6, 2),
        "PARCELS": 5,
        "RUNS": 3,
        "TRS": 80,
        "BATCH": 4,
        "REPEATS": 1,
    }.items():
        monkeypatch.setattr(data, name, value)


def test_every_row_has_a_goal_or_a_reference_and_reaches_table_and_json(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "plan_rows", lambda plan_rows=data.plan_rows: plan_rows(world=8, windows=1000))
    assert bench.main(["data", "--json", str(tmp_path / "f.json"), "--scratch", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["machine"]["cores"] >= 1
    printed = capsys.readouterr().out
    keys = {"name", "value", "unit", "reference", "ratio", "limit_fraction", "goal"}
    for row in written["rows"]:
        assert keys <= set(row) and row["name"] in printed
        assert row["goal"] or row["reference"]
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / row["reference"])
    by_name = {row["name"]: row for row in written["rows"]}
    assert by_name["windows that no rank or two ranks read"]["value"] == 0
    assert not [path for path in tmp_path.iterdir() if path.name != "f.json"]


def test_the_three_ways_of_reading_give_windows_of_equal_sizes(small: None, tmp_path: Path) -> None:
    folder = data.make_data(tmp_path)
    shards = Shards(folder)
    streamed = next(data.webdataset_batches(folder))
    in_memory = torch.utils.data.default_collate([next(iter(data.InMemory(shards))) for _ in range(4)])
    assert [tuple(t.shape) for t in streamed] == [(4, 4, 64, 5), *((4, 64, width) for width in data.WIDTHS)]
    assert [tuple(t.shape) for t in (in_memory["fmri"], *in_memory["features"])] == [tuple(t.shape) for t in streamed]
    plan = Plan(select(shards.manifest, Filter()), 0, 64, 8, 4)
    for shard, offset, count in data._addresses(shards, plan.batch(0, 0)):
        assert offset > 0 and offset + count <= shards.manifest.shards[shard].size
    assert sum(count for *_, count in data._addresses(shards, plan.batch(0, 0))) == 4 * 64 * (24 * 2 + 4 * 5 * 4)


def test_a_window_read_twice_or_never_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan([data.Span(0, 0, 90, (True,))], 0, 64, 64, 16)
    assert data._misread(plan, 4) == 0
    monkeypatch.setattr(data, "micro_batches", lambda numbers, rank, world: [numbers[:4]])
    assert data._misread(plan, 4) == 64


def test_medians_take_turns() -> None:
    taken: list[str] = []
    values = iter(range(6))

    def contender(name: str) -> float:
        taken.append(name)
        return float(next(values))

    medians = benches.in_turns({name: lambda name=name: contender(name) for name in "ab"}, 3)
    assert taken == list("ababab") and medians == {"a": 2.0, "b": 3.0}


def test_what_a_checkpoint_costs_is_what_its_next_steps_take_longer() -> None:
    from tools.benches.train import checkpoint_cost

    steps = [1.0] * 500
    for k in range(50, 500, 50):
        steps[k] += 1.0  # the copy
        steps[k + 3] += 0.5  # the writer beside
    assert checkpoint_cost(steps, 50) == pytest.approx(1.5 / 50)
    assert checkpoint_cost([1.0] * 500, 50) == 0


@pytest.mark.slow
def test_the_bench_of_workers_lets_a_real_one_score(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "RUNS", 12)
    monkeypatch.setattr(data, "PARCELS", 130)  # no fewer than the latent has dimensions
    monkeypatch.setattr(watch, "APPEARANCES", 1)
    monkeypatch.setattr(watch, "POLLS", 1)
    latency, overhead, poll = watch.measure(tmp_path)
    assert latency.reference is not None and overhead.value == pytest.approx(latency.value - latency.reference)
    assert overhead.goal and poll.goal and poll.unit == "ms"
