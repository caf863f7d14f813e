"""The tables of a report: scores, differences, how a distribution does, data, starts. Pure: results in, text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from trainer.config import Config
from trainer.data.identity import DataRecord
from trainer.data.manifest import Manifest
from trainer.data.plan import select
from trainer.errors import InputError
from trainer.evaluation.figures import model_name, pairs_of_parcels
from trainer.evaluation.maps import MODELS
from trainer.evaluation.results import Distribution, RunResults, Scored, StageResults
from trainer.evaluation.same_data import same_bold
from trainer.scoring.intervals import paired_difference

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column's title; numbers stand right, words left. Neighbours with one `group` share a heading above."""

    title: str
    numeric: bool = True
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a report; rows of one group stand together under its title, where it has one."""

    caption: str
    columns: Sequence[Column]
    groups: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    @property
    def headings(self) -> list[tuple[str, int]]:
        """Headings above the columns and how many each spans; empty where none has a group."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(title for title, _ in spans) else []


def number(value: object, digits: int = 4, *, sign: bool = False) -> str:
    """A number as it is printed, with a real minus; a dash for what is not known."""
    if not isinstance(value, int | float | np.floating) or not math.isfinite(value):
        return NOTHING
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def percent(value: object) -> str:
    """A fraction in percent; a dash for what is not known."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{number(100 * value, 0)} %" if known else NOTHING  # type: ignore[operator]  # known is a number


def interval(ends: object, *, sign: bool = False) -> str:
    """A confidence interval; a dash for one of which an end is not known."""
    if not isinstance(ends, Sequence) or len(ends) != 2 or NOTHING in map(number, ends):
        return NOTHING
    return f"{number(ends[0], sign=sign)} to {number(ends[1], sign=sign)}"


SCORE_COLUMNS = ("r", "95 % interval", "Ceiling", "r / ceiling", "RSA", "Flow loss", "Step", "TRs")
OF_DATA = {"Ceiling", "TRs"}
"""What does not depend on the run, and is left out where several stand side by side."""


def score_table(runs: Mapping[str, RunResults]) -> Table:
    """Stages, steps and sets of the checkpoints that are shown; of several runs, by label, side by side."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run.sets))
    columns = [Column("Model", False)]
    for label in runs:
        group = label if len(runs) > 1 else ""
        columns += [Column(title, group=group) for title in SCORE_COLUMNS if len(runs) == 1 or title not in OF_DATA]
    groups = {}
    for name in names:
        models = dict.fromkeys(key for run in runs.values() for key in _models(run, name))
        groups[_set_title(name, runs)] = [
            [
                title,
                *(cell for run in runs.values() for cell in _score_cells(_models(run, name).get(title), len(runs) > 1)),
            ]
            for title in models
        ]
    return _without_empty(Table("Pearson's r, averaged over parcels, then over subjects", columns, groups))


def _without_empty(table: Table) -> Table:
    """The table without columns of which nothing is known."""
    rows = [row for rows in table.groups.values() for row in rows]
    kept = [i for i in range(len(table.columns)) if any(row[i] != NOTHING for row in rows)]
    groups = {title: [[row[i] for i in kept] for row in group] for title, group in table.groups.items()}
    return Table(table.caption, [table.columns[i] for i in kept], groups)


def _set_title(name: str, runs: Mapping[str, RunResults]) -> str:
    return f"{name} (validation)" if any(run.validation == name for run in runs.values()) else name


def _models(run: RunResults, set_name: str) -> dict[str, Scored]:
    """What a run's models are called -> their scores on a set; means before samples."""
    found = [score for stage in run.stages.values() for score in stage.scored if score.set_name == set_name]
    return {model_name(score): score for score in sorted(found, key=lambda s: (s.stage, s.estimate))}


def _score_cells(scored: Scored | None, beside: bool) -> list[str]:
    """Cells of `SCORE_COLUMNS`; without those of the data where runs stand beside each other."""
    score: Mapping[str, Any] = scored.score if scored else {}
    cells = {
        "r": number(score.get("pearson_r")),
        "95 % interval": interval(score.get("ci")),
        "Ceiling": number(score.get("ceiling")),
        "r / ceiling": percent(score.get("r_over_ceiling")),
        "RSA": number(_similarity(score).get("all"), 3),
        "Flow loss": number(score.get("flow_loss")),
        "Step": number(score.get("step"), 0),
        "TRs": number(score.get("n_trs"), 0),
    }
    return [cells[title] for title in SCORE_COLUMNS if not (beside and title in OF_DATA)]


def _similarity(score: Mapping[str, Any]) -> Mapping[str, Any]:
    """Representational similarity by group of parcels; nothing where it is not known."""
    found = score.get("rsa")
    return found if isinstance(found, Mapping) else {}


def similarity_table(runs: Mapping[str, RunResults]) -> Table:
    """Representational similarity by network: a column for each mean, of several runs for each run's last stage."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for label, run in runs.items():
        stages = [run.final] if len(runs) > 1 else list(run.stages.values())
        means = [stage.find(name) for stage in stages if stage is not None for name in run.sets]
        for scored in means:
            if scored is not None and len(_similarity(scored.score)) > 1:
                model = label if len(runs) > 1 else model_name(scored)
                found.setdefault(_set_title(scored.set_name, runs), {})[model] = _similarity(scored.score)
    models = list(dict.fromkeys(model for by_model in found.values() for model in by_model))
    groups = {}
    for title, by_model in found.items():
        names = dict.fromkeys(name for rsa in by_model.values() for name in rsa)
        groups[title] = [[name, *(number(by_model.get(model, {}).get(name), 3) for model in models)] for name in names]
    columns = [Column("Network", False), *(Column(model) for model in models)]
    return Table("Representational similarity: Spearman's rho of predicted and real dissimilarities", columns, groups)


def difference_table(runs: Mapping[str, RunResults]) -> Table:
    """What changes r on each set: from the first run to every other; in one run, from stage 1 to stage 2."""
    groups: dict[str, list[list[str]]] = {}
    for name in dict.fromkeys(name for run in runs.values() for name in run.sets):
        rows = [[title, *_difference_cells(a, b)] for title, a, b in _compared(runs, name)]
        if rows:
            groups[_set_title(name, runs)] = rows
    columns = [Column("Difference", False), Column("in r"), Column("95 % interval")]
    return Table("Differences of r, paired: both are resampled alike", columns, groups)


def _compared(runs: Mapping[str, RunResults], set_name: str) -> list[tuple[str, Scored, Scored]]:
    """(title, before, after) of what is compared on a set."""
    if len(runs) == 1:
        stages = next(iter(runs.values())).stages
        pair = [stage.find(set_name) for stage in stages.values()]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
            return [("Stage 2, mean − stage 1", pair[0], pair[1])]
        return []
    (first, base), *others = ((label, _models(run, set_name)) for label, run in runs.items())
    return [
        (f"{title}: {label} − {first}", base[title], models[title])
        for label, models in others
        for title in base
        if title in models
    ]


def _difference_cells(before: Scored, after: Scored) -> list[str]:
    if not same_bold(before.score, after.score):
        return [NOTHING, "other BOLD"]
    old, new = before.score.get("pearson_r"), after.score.get("pearson_r")
    change = None if old is None or new is None else new - old
    if before.bootstrap is None or after.bootstrap is None or before.bootstrap.shape != after.bootstrap.shape:
        return [number(change, sign=True), "not known"]
    _, *ends = paired_difference(after.bootstrap, before.bootstrap)
    return [number(change, sign=True), interval(ends, sign=True)]


JUDGEMENTS = {
    "crps": "CRPS",
    "energy": "Energy",
    "variogram": "Variogram",
    "coverage_50": "50 %",
    "coverage_80": "80 %",
    "coverage_95": "95 %",
    "fc_r": "FC r",
    "fc_error": "FC error",
    "spectrum_error": "Spectrum error",
}


def distribution_table(found: Distribution) -> Table:
    """What stage 2's samples and the baselines reach, a row for each."""
    rows = []
    for key in (key for key in MODELS if isinstance(found.facts.get(key), Mapping)):
        facts = found.facts[key]
        cells = [percent(facts.get(k)) if k.startswith("coverage") else number(facts.get(k)) for k in JUDGEMENTS]
        rows.append([MODELS[key], *cells])
    groups = ["Coverage of intervals" if key.startswith("coverage") else "" for key in JUDGEMENTS]
    columns = [Column(title, group=group) for title, group in zip(JUDGEMENTS.values(), groups, strict=True)]
    title = f"{found.facts.get('samples', 'Several')} samples of each model against real BOLD"
    if pairs := pairs_of_parcels(found.facts):
        title += f"; FC and full covariance on {pairs}"
    return Table(title, [Column("Model", False), *columns], {"": rows})


def data_table(config: Config, manifest: Manifest, record: DataRecord | None = None) -> Table:
    """The sets of a configuration: runs, TRs, hours, and subjects with BOLD; sets that a stage used as it recorded."""
    rows = []
    for name, dataset in config.datasets.items():
        try:
            used = record.spans(name, dataset.filter, manifest) if record else None
            spans = select(manifest, dataset.filter) if used is None else used
        except InputError:
            rows.append([name, NOTHING, NOTHING, NOTHING, NOTHING])
            continue
        trs = sum(len(span) for span in spans)
        subjects = np.any([span.subjects for span in spans], axis=0).sum()
        cells = [number(len(spans), 0), number(trs, 0), number(trs * manifest.tr / 3600, 2), str(subjects)]
        rows.append([name, *cells])
    titles = ("Runs", "TRs", "Hours", "Subjects")
    return Table("Sets", [Column("Set", False), *(Column(title) for title in titles)], {"": rows})


def start_table(stages: Mapping[int, StageResults]) -> Table:
    """Every start of a training: when, where, on how many processes, from which code."""
    rows = []
    for stage in stages.values():
        for start in stage.starts:
            commit = str(start.get("git_commit") or NOTHING)[:10]
            changed = " + changes" if start.get("git_diff") else ""
            job = (start.get("slurm") or {}).get("SLURM_JOB_ID", NOTHING)
            world, host = start.get("world", NOTHING), start.get("host", NOTHING)
            when = when_utc(start.get("time"))
            rows.append(
                [f"Stage {stage.number}", str(start["start"]), when, str(host), str(world), str(job), commit + changed]
            )
    titles = ("Stage", "Start", "Time (UTC)", "Host", "Processes", "SLURM job", "Commit")
    return Table("Starts", [Column(title, title in ("Start", "Processes")) for title in titles], {"": rows})


def when_utc(seconds: object) -> str:
    """A time as date and minute, UTC."""
    if not isinstance(seconds, int | float):
        return NOTHING
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
