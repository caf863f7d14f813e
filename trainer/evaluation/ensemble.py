"""The average of the best checkpoints, chosen for each subject and parcel: `python -m trainer ensemble`.

On one set (`--choose-on`) the r of every checkpoint, subject and parcel is known from the score files. For each subject
and parcel the N checkpoints of highest r there are taken, their predictions of another set are z-scored over its TRs
and averaged, and the average is scored. Pearson's r does not see the scale of a prediction, so without z-scores the
checkpoint that happens to predict the largest numbers would decide; with them all N have the same say. A subject whose
BOLD is absent from the choosing set takes the checkpoints that are best for the others on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data.batches import whole_runs
from trainer.data.identity import differ
from trainer.data.manifest import BOLD
from trainer.data.plan import Span
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.progress import say, watched
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.files import check_writable, write_json
from trainer.run.processes import use_tf32
from trainer.scoring.known import open_study, warn
from trainer.scoring.metrics import Correlation, PearsonR
from trainer.scoring.predictor import estimated, load_predictor
from trainer.scoring.records import on_other_data, printed, summary, write_array
from trainer.stored import load_stored


@dataclass(frozen=True)
class Candidate:
    """A checkpoint whose r (S, V) on the choosing set is known."""

    study: Study
    stage: int
    directory: StageDirectory
    step: int
    refit: bool
    r: np.ndarray

    def __str__(self) -> str:
        return f"{self.directory.path}, step {self.step}"


def ensemble(runs: Sequence[RunDirectory], set_name: str, choose_on: str, best: int) -> dict[str, Any]:
    """Choose, average and score; writes `ensemble/<set>.json` and `.npy` (S, V) into the first run.

    Returns: what the score file holds.

    Raises:
        InputError: the two sets share TRs, or a model was trained on the scored one; the runs differ in subjects,
            parcels, sets, their BOLD or its scaling; shards hold other data than a run or a score has seen; no
            checkpoint has been scored on `choose_on`; no such run or set; the first
            run cannot be written.
    """
    if best < 1:
        raise InputError("--best", "", found=best, expected="1 or more")
    if set_name == choose_on:
        raise InputError("--choose-on", "the set that is scored", found=choose_on, expected="another one than --set")
    found = [candidate for run in runs for candidate in _candidates(run, set_name, choose_on)]
    if not found:
        where = ", ".join(str(run.path) for run in runs)
        fix = f"Score them first: python -m trainer evaluate DIR --step all --set {choose_on}"
        raise InputError("--choose-on", f"no checkpoint of {where} is scored there", found=choose_on, fix=fix)
    study = found[0].study
    for candidate in found:
        _check_alike(candidate, found[0], (set_name, choose_on))
    study.check_apart(set_name, choose_on, study.spans[choose_on])
    for candidate in found:
        trained_on = candidate.study.training_spans(refit=candidate.refit)
        candidate.study.check_apart(set_name, f"what {candidate} was trained on", trained_on)
    check_writable(runs[0].path / "ensemble", "Name a run first that you may write to: the first keeps the scores.")
    chosen = choose(np.stack([candidate.r for candidate in found]), best)
    use_tf32(False)  # as all scores are taken
    correlation, alone = _score(found, chosen, study, set_name)
    content = _content(found, chosen, correlation, alone, (set_name, choose_on, best))
    _write(runs[0].path / "ensemble" / set_name, correlation, content)
    for line in lines(content):
        say(line)
    return content


def _candidates(run: RunDirectory, set_name: str, choose_on: str) -> list[Candidate]:
    """All checkpoints of a run, of both stages and their refits, that are there and scored on the choosing set."""
    started = [number for number in (1, 2) if run.stage(number).has_started()]
    if not started:
        raise InputError(run.path, "holds no training", expected="a run directory with stage1/")
    found = []
    for number in started:
        study = open_study(run.stage(number), load_stored(run.stage(number).config))
        warn(study.warnings)
        study.check_scorable(set_name)
        study.check_scorable(choose_on, "--choose-on")
        shape = (len(study.manifest.subjects), study.manifest.parcels)
        for directory, refit in ((run.stage(number), False), (run.stage(number).refit, True)):
            kept = set(checkpoint.steps(directory.checkpoints))
            for path, score in directory.scores_with_paths():
                if (score.get("set"), score.get("estimate")) == (choose_on, "mean") and score["step"] in kept:
                    _check_data(path, score, study, choose_on)
                    r = _read_r(path.with_suffix(".npy"), shape)
                    found.append(Candidate(study, number, directory, score["step"], refit, r))
    return found


def _check_data(path: Path, score: dict[str, Any], study: Study, choose_on: str) -> None:
    """Raise InputError where a score was taken on other data than the shards hold now."""
    if on_other_data(score, study.digest(choose_on)):
        fix = f"Score it again: python -m trainer evaluate DIR --step all --set {choose_on}"
        raise InputError(path, f"was taken on other data than {choose_on} holds now", fix=fix)


def _read_r(path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        r: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(path, "cannot be read", found=error, expected="r of every subject and parcel") from error
    if r.shape != shape:
        raise InputError(path, "shape", found=r.shape, expected=shape)
    return r


def _check_alike(one: Candidate, other: Candidate, sets: Sequence[str]) -> None:
    """What two checkpoints predict and are scored against must be the same thing. Raises InputError."""
    a, b = one.study, other.study
    compared: list[tuple[str, Any, Any]] = [
        ("subjects", a.manifest.subjects, b.manifest.subjects),
        ("parcels", a.manifest.parcels, b.manifest.parcels),
        ("bold.standardise", a.config.bold.standardise, b.config.bold.standardise),
    ]
    compared += [(f"datasets.{name}", _described(a, name), _described(b, name)) for name in sets]
    for what, found, expected in compared:
        if found != expected:
            expected = f"{expected} as in {other.directory.path}"
            raise InputError(one.directory.path, f"{what} differ(s)", found=found, expected=expected)
    for name in sets:
        if BOLD in differ(a.digest(name), b.digest(name)):
            raise InputError(one.directory.path, f"has other BOLD in {name} than {other.directory.path}")


def _described(study: Study, name: str) -> list[tuple[str, int, int, tuple[bool, ...]]]:
    """The TRs of a set, whatever shards they come from."""
    samples = study.manifest.samples
    return [(samples[span.sample].key, span.start, span.stop, span.subjects) for span in study.spans[name]]


def choose(r: np.ndarray, best: int) -> np.ndarray:
    """Which checkpoints each subject and parcel takes: those of highest r, of equals the earlier; NaN comes last.

    A subject without any r takes what is best for the mean of the others.

    Args:
        r: (M, S, V) of M checkpoints.

    Returns: (M, S, V) bool, `best` true ones (M where there are fewer) along the first axis.
    """
    known = np.isfinite(r)
    total, count = np.where(known, r, 0).sum(1, keepdims=True), known.sum(1, keepdims=True)
    others = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
    absent = ~known.any(axis=(0, 2))
    rated = np.where(absent[None, :, None], others, np.where(known, r, -np.inf))
    order = np.argsort(-rated, axis=0, kind="stable")
    chosen = np.zeros(r.shape, bool)
    np.put_along_axis(chosen, order[:best], True, axis=0)
    return chosen


def _score(
    candidates: Sequence[Candidate], chosen: np.ndarray, study: Study, set_name: str
) -> tuple[Correlation, dict[int, Correlation]]:
    """r of the average on a set, and of each checkpoint that has a part in it, by its number.

    One model and the average's predictions of the whole set are in memory, S x TRs x V float32 twice.
    """
    runs = whole_runs(study.shards, study.spans[set_name], [], study.scaling)
    bold = [batch.bold[0] for batch in watched(runs, f"reading {set_name}", len(study.spans[set_name]))]
    averages = [np.zeros(tuple(run.shape), np.float32) for run in bold]
    spans, alone = study.spans[set_name], {}
    parts = [i for i in range(len(candidates)) if chosen[i].any()]
    for i in watched(parts, "checkpoints", len(parts)):
        predictions = _predictions(candidates[i], set_name)
        alone[i] = _pearson(predictions, bold, spans)
        for average, z in zip(averages, z_scored(predictions, spans), strict=True):
            average += np.where(chosen[i][:, None], z, 0)
    return _pearson(averages, bold, spans), alone


def _predictions(candidate: Candidate, set_name: str) -> list[np.ndarray]:
    """(S, T, V) float32 of each run of a set."""
    study, device = candidate.study, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = load_predictor(candidate.directory, candidate.stage, candidate.step, study, device)
    context = study.config.data.context_trs
    batches = whole_runs(study.shards, study.spans[set_name], study.streams, study.scaling, context=context)
    runs = watched(batches, f"predicting {set_name}", len(study.spans[set_name]))
    return [estimated(predictor, batch.to(device), "mean") for batch in runs]


def z_scored(predictions: Sequence[np.ndarray], spans: Sequence[Span]) -> list[np.ndarray]:
    """Predictions (S, T, V) z-scored for each subject and parcel over the TRs of all runs that the subject has BOLD of.

    What does not vary becomes 0.
    """
    used = np.array([span.subjects for span in spans])  # (runs, S)
    n_trs = np.array([run.shape[1] for run in predictions])
    total = np.maximum(used.T @ n_trs, 1)[:, None]
    sums = [run.sum(1, dtype=np.float64) * u[:, None] for run, u in zip(predictions, used, strict=True)]
    mean = np.sum(sums, 0) / total
    squares = [np.square(run - mean[:, None]).sum(1) * u[:, None] for run, u in zip(predictions, used, strict=True)]
    std = np.sqrt(np.sum(squares, 0) / total)
    varies = std > np.finfo(np.float32).eps * np.abs(mean)
    scale = np.where(varies, 1 / np.where(varies, std, 1), 0)
    return [((run - mean[:, None]) * scale[:, None]).astype(np.float32) for run in predictions]


def _pearson(predictions: Sequence[np.ndarray], bold: Sequence[torch.Tensor], spans: Sequence[Span]) -> Correlation:
    sums = PearsonR(*predictions[0].shape[::2])
    for prediction, run, span in zip(predictions, bold, spans, strict=True):
        valid = torch.tensor(span.subjects)[:, None].expand(-1, run.shape[1])
        sums.update(torch.from_numpy(prediction)[None], run[None], valid[None])
    return sums.compute()


def _content(
    candidates: Sequence[Candidate],
    chosen: np.ndarray,
    correlation: Correlation,
    alone: dict[int, Correlation],
    asked: tuple[str, str, int],
) -> dict[str, Any]:
    """What the score file holds."""
    set_name, choose_on, best = asked
    subjects = candidates[0].study.manifest.subjects
    members = [
        {
            "checkpoint": str(candidates[i].directory.path),
            "stage": candidates[i].stage,
            "step": candidates[i].step,
            "share": float(chosen[i].mean()),
            "pearson_r_choose_on": _finite(float(np.nanmean(candidates[i].r))),
            "pearson_r": _finite(found.overall),
        }
        for i, found in alone.items()
    ]
    return {
        "set": set_name,
        "choose_on": choose_on,
        "best": best,
        "estimate": "mean",
        "subjects": list(subjects),
        "n_candidates": len(candidates),
        **summary(correlation, subjects),
        "members": members,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _write(stem: Path, correlation: Correlation, content: dict[str, Any]) -> None:
    """The r of every subject and parcel, then what says that it is there."""
    write_array(stem.with_suffix(".npy"), correlation.r)
    write_json(stem.with_suffix(".json"), content)


def lines(content: dict[str, Any]) -> list[str]:
    """The score as it is printed, the ensemble beside its parts."""
    title = f"Ensemble of the best {content['best']} of {content['n_candidates']} checkpoints on {content['choose_on']}"
    parts = [
        f"  {part['checkpoint']} step {part['step']}: r {printed(part['pearson_r'])} alone, in {part['share']:.0%}"
        for part in sorted(content["members"], key=lambda part: -part["share"])
    ]
    subjects = [f"  Sub {label} Mean Pearson's r: {printed(r)}" for label, r in content["per_subject"].items()]
    return [f"{title}, {content['set']} Overall Pearson's r: {printed(content['pearson_r'])}", *subjects, *parts]
