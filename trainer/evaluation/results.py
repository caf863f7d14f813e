"""What a run holds for those who look at it, whatever part of it is there.

Everything is read from the files of the run (and the manifest of its shards). A file that is missing leaves its place
empty; one that cannot be read also leaves a sentence in `notes`: a report of a run that failed half-way is wanted most.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trainer.config import Config
from trainer.data.identity import DataRecord
from trainer.data.manifest import Manifest
from trainer.errors import InputError
from trainer.evaluation import same_data
from trainer.evaluation.curves import Curves, Points
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.files import names, read_object
from trainer.run.status import StageStatus, read_facts, stage_status
from trainer.scoring.known import known_data
from trainer.stored import load_stored

Value = TypeVar("Value")
_UNREADABLE = (InputError, OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Scored:
    """One estimate of a stage's chosen checkpoint on one set.

    Attributes:
        stage: 1 or 2.
        refitted: the model was trained again on train + validation.
        score: what the score file holds.
        r: (S, V); None where the array is missing.
        bootstrap: (B, S) resampled r; None where there is none.
    """

    stage: int
    refitted: bool
    score: Mapping[str, Any]
    r: np.ndarray | None = None
    bootstrap: np.ndarray | None = None

    @property
    def set_name(self) -> str:
        """The set that was scored."""
        return str(self.score["set"])

    @property
    def estimate(self) -> str:
        """`mean` or `sample`."""
        return str(self.score["estimate"])

    @property
    def subjects(self) -> list[str]:
        """Labels of the rows of r."""
        return [str(label) for label in self.score["subjects"]]


@dataclass(frozen=True)
class Distribution:
    """How stage 2's samples compare with real BOLD on a set: `facts` by model, and `arrays` to draw."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class StageResults:
    """One stage of a run.

    Attributes:
        number: 1 or 2.
        status: of its parts (the stage, its refit), as `python -m trainer status` says it.
        curves: what its training left.
        step: of the checkpoint that is shown: the chosen one, or the best so far; None where none was scored.
        scored: estimates of that checkpoint.
        distributions, series: by set; of stage 2 the former.
        starts: what the starts of its training have written down, oldest first.
        config: config.yaml as it stands there.
    """

    number: int
    status: Sequence[StageStatus] = ()
    curves: Curves = field(default_factory=Curves)
    step: int | None = None
    scored: Sequence[Scored] = ()
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    series: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    starts: Sequence[Mapping[str, Any]] = ()
    config: str = ""

    def find(self, set_name: str, estimate: str = "mean") -> Scored | None:
        """The score of an estimate on a set."""
        return next((s for s in self.scored if (s.set_name, s.estimate) == (set_name, estimate)), None)


@dataclass(frozen=True)
class RunResults:
    """A run.

    Attributes:
        path: its directory.
        stages: those that have begun, by number.
        ceilings: set -> noise ceiling (S, V) of one run of BOLD.
        config: None where it cannot be read.
        manifest: of the shards, on the run's subject axis; None where they are not here.
        record: what the last stage that has begun was trained and validated on; None where nothing says.
        notes: what could not be read, a sentence each.
    """

    path: Path
    stages: Mapping[int, StageResults]
    ceilings: Mapping[str, np.ndarray] = field(default_factory=dict)
    config: Config | None = None
    manifest: Manifest | None = None
    notes: Sequence[str] = ()
    record: DataRecord | None = None

    @property
    def dropped_parcels(self) -> tuple[int, ...]:
        """The columns of the BOLD files that the shards lack, as far as they are here."""
        return self.manifest.dropped_parcels if self.manifest else ()

    @property
    def final(self) -> StageResults | None:
        """The last stage that has scores."""
        return next((self.stages[n] for n in sorted(self.stages, reverse=True) if self.stages[n].scored), None)

    @property
    def sets(self) -> list[str]:
        """Sets with scores, in the order of the configuration, those that nothing was chosen by first."""
        found = {score.set_name for stage in self.stages.values() for score in stage.scored}
        known = list(self.config.datasets) if self.config else []
        ordered = [name for name in known if name in found] + sorted(found.difference(known))
        return sorted(ordered, key=lambda name: name == self.validation)

    @property
    def validation(self) -> str | None:
        """The set that chose the checkpoints."""
        return self.config.val_set_name if self.config else None


class _Reader:
    """Reads what may be missing or torn; what cannot be read becomes a note."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def get(self, read: Callable[[Path], Value], path: Path) -> Value | None:
        """What is read from a path, or None; and a note, where something is there that cannot be read."""
        try:
            return read(path) if path.exists() else None
        except InputError as error:
            self.notes.append(str(error))
        except _UNREADABLE as error:
            self.notes.append(f"{path}: cannot be read: found {type(error).__name__}: {error}")
        return None

    def listed(self, folder: Path, ending: str) -> list[Path]:
        """The files of a folder whose names end so, in the order of their names."""
        return [folder / name for name in sorted(self.get(names, folder) or ()) if name.endswith(ending)]

    def array(self, path: Path, dimensions: int = 2) -> np.ndarray | None:
        """A .npy of so many axes."""
        array: np.ndarray | None = self.get(np.load, path)
        if array is not None and array.ndim != dimensions:
            self.notes.append(f"{path}: found {array.ndim} axes, expected {dimensions}")
            return None
        return array

    def arrays(self, path: Path) -> dict[str, Any] | None:
        """A .npz."""
        return self.get(_read_arrays, path)


def _read_arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read_results(path: Path) -> RunResults:
    """Gather what a run directory holds; no stages of one where nothing has begun."""
    run = RunDirectory(path)
    started = [number for number in (1, 2) if run.stage(number).has_started()]
    reader = _Reader()
    file = run.stage(max(started, default=1)).config
    config = reader.get(load_stored, file)
    stages = {number: _read_stage(run, number, config, reader) for number in started}
    files = [file for file in reader.listed(path / "ceilings", ".npy") if not file.stem.endswith("-isc")]
    ceilings = {file.stem: reader.array(file) for file in files}
    known = reader.get(lambda _: known_data(run.stage(max(started))), path) if started else None
    manifest = _read_manifest(config.data.shards) if config else None
    if known and manifest is not None and config is not None:
        reader.notes += same_data.notes_on_shards(known, manifest, config.data.shards)
        manifest = manifest.with_subjects(known[0].record.subjects)
    return RunResults(
        path=path,
        stages=stages,
        ceilings={name: array for name, array in ceilings.items() if array is not None},
        config=config,
        manifest=manifest,
        record=known[0].record if known else None,
        notes=list(dict.fromkeys(reader.notes)),
    )


def _read_manifest(shards: str) -> Manifest | None:
    """Of shards that are here; a URL is not followed for a report."""
    try:
        return Manifest.read(shards)
    except InputError:
        return None


def _read_stage(run: RunDirectory, number: int, config: Config | None, reader: _Reader) -> StageResults:
    directory = run.stage(number)
    scores = _scores(directory, reader)
    finished = reader.get(read_object, directory.path / "finished.json")
    validation = config.val_set_name if config else ""
    step = finished.get("step") if finished else checkpoint.best_step((score for _, score in scores), validation)
    if step is None and scores:
        step = max(score["step"] for _, score in scores)
    reader.notes += same_data.notes_on_scores(directory, [score for _, score in scores], step)
    found: dict[tuple[str, str], tuple[StageDirectory, Scored]] = {}
    for part in (directory, directory.refit):
        for path, score in _scores(part, reader) if part is not directory else scores:
            if score["step"] == step:
                found[score["set"], score["estimate"]] = (
                    part,
                    _read_scored(number, part is not directory, path, score, reader),
                )
    homes = {name: part for (name, estimate), (part, _) in found.items() if estimate == "mean"}
    stem = {name: str(part.scores / f"step_{step:08d}-{name}") for name, part in homes.items()}
    series = {name: reader.arrays(Path(f"{start}-series.npz")) for name, start in stem.items()}
    distributions = {name: _read_distribution(start, reader) for name, start in stem.items()} if number == 2 else {}
    return StageResults(
        number=number,
        status=reader.get(lambda _: [stage_status(facts) for facts in read_facts(run, number)], directory.path) or (),
        curves=_read_curves(directory, scores, step, reader),
        step=step,
        scored=[scored for _, scored in found.values()],
        distributions={name: found for name, found in distributions.items() if found is not None},
        series={name: arrays for name, arrays in series.items() if arrays is not None},
        starts=_read_starts(directory, reader),
        config=reader.get(Path.read_text, directory.config) or "",
    )


def _scores(directory: StageDirectory, reader: _Reader) -> list[tuple[Path, dict[str, Any]]]:
    """The score files with their paths; other files of the folder (of a distribution, say) are no scores."""
    wanted = {"step", "set", "estimate", "subjects"}
    read = [(path, reader.get(read_object, path)) for path in reader.listed(directory.scores, ".json")]
    return [(path, score) for path, score in read if score is not None and wanted <= score.keys()]


def _read_scored(number: int, refitted: bool, path: Path, score: dict[str, Any], reader: _Reader) -> Scored:
    r = reader.array(path.with_suffix(".npy"))
    bootstrap = reader.array(path.with_name(f"{path.stem}-bootstrap.npy"))
    if r is not None and len(r) != len(score["subjects"]):
        reader.notes.append(f"{path.with_suffix('.npy')}: found {len(r)} subjects, expected {len(score['subjects'])}")
        r = None
    return Scored(number, refitted, score, r, bootstrap)


def _read_distribution(stem: str, reader: _Reader) -> Distribution | None:
    path = Path(f"{stem}-distribution.json")
    facts = reader.get(read_object, path)
    if facts is None:
        return None
    return Distribution(facts, reader.arrays(path.with_suffix(".npz")) or {})


def _read_curves(
    directory: StageDirectory, scores: Sequence[tuple[Path, dict[str, Any]]], step: int | None, reader: _Reader
) -> Curves:
    log = reader.get(lambda _: directory.read_metrics(), directory.metrics) or []
    r: dict[str, dict[int, float]] = defaultdict(dict)
    for line in log:
        if line["kind"] == "val" and line.get("pearson_r") is not None:
            r[line["set"]][line["step"]] = line["pearson_r"]
    for _, score in scores:
        if score["estimate"] == "mean" and score.get("pearson_r") is not None:
            r[score["set"]][score["step"]] = score["pearson_r"]
    return Curves(
        loss=_points(log, "train", "loss"),
        validation_loss=_points(log, "val", "flow_loss"),
        r={name: sorted(points.items()) for name, points in sorted(r.items())},
        chosen=step,
    )


def _points(log: Sequence[Mapping[str, Any]], kind: str, key: str) -> Points:
    return [(line["step"], line[key]) for line in log if line["kind"] == kind and line.get(key) is not None]


def _read_starts(directory: StageDirectory, reader: _Reader) -> list[dict[str, Any]]:
    paths = [path for path in reader.listed(directory.path / "starts", ".json") if path.stem.isdigit()]
    paths.sort(key=lambda path: int(path.stem))
    read = [(path, reader.get(read_object, path)) for path in paths]
    return [{**start, "start": int(path.stem)} for path, start in read if start is not None]
