"""Tables say what is known, align it, and leave out what nobody knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.evaluation.results import Distribution, RunResults, Scored, StageResults
from trainer.evaluation.tables import (
    NOTHING,
    Column,
    Table,
    difference_table,
    distribution_table,
    interval,
    number,
    percent,
    score_table,
    similarity_table,
    when_utc,
)


def scored(stage: int, r: float, name: str = "test", **more: Any) -> Scored:
    bootstrap = more.pop("bootstrap", None)
    score = {"set": name, "estimate": "mean", "step": 1200, "subjects": ["1"], "pearson_r": r, "n_trs": 1465, **more}
    return Scored(stage, False, score, None, bootstrap)


def run(*scores: Scored) -> RunResults:
    stages = {n: StageResults(n, scored=[s for s in scores if s.stage == n]) for n in sorted({s.stage for s in scores})}
    return RunResults(Path("run"), stages)


def titles(table: Table) -> list[str]:
    return [column.title for column in table.columns]


def test_numbers_have_a_real_minus_and_what_is_not_known_a_dash() -> None:
    assert [number(-0.12345), number(0.5, 2, sign=True), number(1465, 0)] == ["−0.1235", "+0.50", "1,465"]
    assert [number(None), number(float("nan")), percent(None), interval(None), interval([1])] == [NOTHING] * 5
    assert (percent(0.974), interval([-0.1, 0.2], sign=True)) == ("97 %", "−0.1000 to +0.2000")
    assert (when_utc(0), when_utc(None)) == ("1970-01-01 00:00", NOTHING)


def test_the_scores_of_one_run_stand_by_set_without_columns_that_nobody_fills() -> None:
    table = score_table({"a": run(scored(1, 0.1, ci=[0.05, 0.15]), scored(2, 0.2, flow_loss=1.3))})
    assert titles(table) == ["Model", "r", "95 % interval", "Flow loss", "Step", "TRs"]
    assert table.groups == {
        "test": [
            ["Stage 1", "0.1000", "0.0500 to 0.1500", NOTHING, "1,200", "1,465"],
            ["Stage 2, mean", "0.2000", NOTHING, "1.3000", "1,200", "1,465"],
        ]
    }
    assert table.headings == []


def test_several_runs_stand_side_by_side_and_a_gap_is_a_dash() -> None:
    table = score_table({"a": run(scored(1, 0.1)), "b": run(scored(1, 0.2), scored(2, 0.3, "other"))})
    assert titles(table) == ["Model", "r", "Step", "r", "Step"]
    assert table.headings == [("", 1), ("a", 2), ("b", 2)]
    assert table.groups["other"] == [["Stage 2, mean", NOTHING, NOTHING, "0.3000", "1,200"]]


def test_a_difference_has_the_interval_of_paired_resamplings() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0.1, 0.05, (200, 4))
    after = before + 0.02 + rng.normal(0, 1e-4, (200, 4))
    pair = [scored(1, 0.1, bootstrap=before), scored(2, 0.12, bootstrap=after)]
    (row,) = difference_table({"a": run(*pair)}).groups["test"]
    assert row[:2] == ["Stage 2, mean − stage 1", "+0.0200"]
    low, high = (float(end) for end in row[2].split(" to "))
    assert 0.019 < low < 0.02 < high < 0.021, "far narrower than either r is known"
    others = {"a": run(pair[0]), "b": run(scored(1, 0.12, bootstrap=after)), "c": run(scored(1, 0.09))}
    rows = difference_table(others).groups["test"]
    assert rows[0] == ["Stage 1: b − a", *row[1:]]
    assert rows[1] == ["Stage 1: c − a", "−0.0100", "not known"]
    assert difference_table({"a": run(pair[0])}).groups == {}


def test_contenders_stand_below_each_other_as_far_as_they_were_judged() -> None:
    facts = {"samples": 16, "stage": 2, "flow": {"crps": 0.5, "coverage_80": 0.79}, "independent": {"crps": 0.6}}
    table = distribution_table(Distribution(facts, {}))
    assert table.caption.startswith("16 samples")
    assert [row[:2] for row in table.groups[""]] == [["Flow", "0.5000"], ["Independent AR(1)", "0.6000"]]
    assert table.groups[""][0][titles(table).index("80 %")] == "79 %"
    assert table.headings == [("", 4), ("Coverage of intervals", 3), ("", 3)]


def test_similarity_stands_by_network_where_labels_were_given() -> None:
    results = run(scored(1, 0.1, rsa={"all": 0.2, "Vis": 0.3}), scored(2, 0.1, rsa={"all": 0.25}))
    table = similarity_table({"a": results})
    assert (titles(table), table.groups) == (["Network", "Stage 1"], {"test": [["all", "0.200"], ["Vis", "0.300"]]})
    assert similarity_table({"a": run(scored(1, 0.1, rsa={"all": 0.2}))}).groups == {}


@pytest.mark.parametrize("groups", [["", "", ""], ["", "a", "a"]])
def test_headings_span_all_columns(groups: list[str]) -> None:
    table = Table("t", [Column(str(i), group=group) for i, group in enumerate(groups)])
    assert sum(span for _, span in table.headings) in (0, len(groups))
