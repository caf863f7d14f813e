"""One predictor and one set of runs make one score file, with the r of every parcel beside it.

    scores/step_00000500-val-mean.json     {"stage": 1, "step": 500, "set": "val", "estimate": "mean", "pearson_r": ...}
    scores/step_00000500-val-mean.npy      (S, V) float64

Runs are scored whole and one at a time, on the rank that is dealt them, so memory does not grow with the set but for
the sums that each run leaves (5 x (S, V) float64 for each pair of prediction and BOLD).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.batches import Batch, whole_runs
from trainer.data.study import Study
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory, write_json
from trainer.scoring.metrics import Correlation, PearsonR
from trainer.scoring.predictor import FlowPredictor, Predictor, load_predictor
from trainer.scoring.shares import Ranks, in_order, shown

ESTIMATES = ("mean", "sample")


def score_checkpoint(
    directory: StageDirectory,
    stage: int,
    step: int,
    study: Study,
    sets: Sequence[str],
    processes: Ranks,
    say: Callable[[str], None],
    *,
    full: bool = False,
) -> None:
    """Score one checkpoint on some sets; the main process writes the score files and prints them through `say`.

    Raises:
        InputError: the checkpoint is missing, damaged, or does not fit the shards.
    """
    estimates = ESTIMATES[:1] if stage == 1 else ESTIMATES
    predictor = load_predictor(directory, stage, step, study, processes.device, estimates)
    epoch = step // checkpoint.read_meta(checkpoint.folder_of(directory.checkpoints, step))["steps_per_epoch"]
    for set_name in sets:
        scores = score_set(predictor, study, set_name, processes)
        facts = {"stage": stage, "step": step, "set": set_name, "epoch": epoch, **({"full": True} if full else {})}
        processes.first(partial(_record, directory, scores, study.manifest.subjects, facts, say))


def _record(
    directory: StageDirectory,
    scores: SetScores,
    subjects: Sequence[str],
    facts: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Write and print the scores of a set; one that validated the training before goes on to do so."""
    validated = facts["step"] in checkpoint.qualities(directory.read_scores(), facts["set"])
    written = write_scores(directory, scores, subjects, {**facts, "validation": validated})
    for estimate, score in written.items():
        say(f"-- {facts['set']}, {estimate}, step {facts['step']} ({directory.scores})")
        say("\n".join(lines(score)))


@dataclass(frozen=True)
class SetScores:
    """What one predictor reached on one set: r of every pair it gives, and stage 2's loss."""

    correlations: dict[str, Correlation]
    flow_loss: float | None


@dataclass(frozen=True)
class RunScores:
    """What one run adds to the scores of its set.

    pairs: what was seen of every pair that the predictor gives.
    loss, count: stage 2's loss, summed over `count` valid (subject, TR) pairs; 0, 0 where there is none.
    """

    pairs: dict[str, PearsonR]
    loss: float
    count: int


def score_set(predictor: Predictor, study: Study, set_name: str, processes: Ranks) -> SetScores:
    """Score a predictor over all TRs of a set, on all ranks; every rank gets the scores.

    The ranks share the runs. Each run has sums of its own, in one process too, and they are merged in the order of the
    runs: the scores are the same to the bit for any number of ranks.

    Raises:
        InputError: on every rank, where one cannot read a shard.
    """
    spans = study.spans[set_name]

    def score_share() -> list[RunScores]:
        batches = whole_runs(
            study.shards, spans, study.streams, study.scaling,
            context=study.config.data.context_trs, rank=processes.rank, world=processes.world,
        )  # fmt: skip
        runs = shown(processes, batches, f"scoring {set_name}", len(spans))
        return [_score_run(predictor, batch.to(processes.device)) for batch in runs]

    return _merge(in_order(processes, score_share))


def _score_run(predictor: Predictor, batch: Batch) -> RunScores:
    """The sums of one run."""
    scored = batch.cut(batch.scored())
    valid = scored.mask[:, None, :] & scored.subject_mask[:, :, None]
    pairs = {}
    for name, (prediction, target) in predictor.predict(batch).items():
        pairs[name] = PearsonR(*target.shape[1::2])
        pairs[name].update(prediction, target, valid)
    if isinstance(predictor, FlowPredictor) and predictor.has_fixed_latent:
        return RunScores(pairs, *predictor.loss(batch))
    return RunScores(pairs, 0.0, 0)


def _merge(runs: Sequence[RunScores]) -> SetScores:
    """The scores of the runs of a set, which are taken in one after the other."""
    correlations = {}
    for name, first in runs[0].pairs.items():
        whole = PearsonR(*first.mean_x.shape)
        for run in runs:
            whole.merge(run.pairs[name])
        correlations[name] = whole.compute()
    count = sum(run.count for run in runs)
    return SetScores(correlations, sum(run.loss for run in runs) / count if count else None)


def write_scores(
    directory: StageDirectory,
    scores: SetScores,
    subjects: Sequence[str],
    facts: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write one score file for each estimate; returns estimate -> what the file holds.

    `facts` are stage, step, set, epoch, and `validation`: whether this is the training's own validation, by which it
    chooses.
    """
    written = {}
    correlations = scores.correlations
    for estimate in (name for name in ESTIMATES if name in correlations):
        content = {
            **facts,
            "estimate": estimate,
            "subjects": list(subjects),
            **summary(correlations[estimate], subjects),
        }
        beside = {"subspace": f"{estimate}_subspace", "anchor": "anchor", "anchor_subspace": "anchor_subspace"}
        for key, name in beside.items():
            if name in correlations:
                content[f"pearson_r_{key}"] = _finite(correlations[name].overall)
        if scores.flow_loss is not None:
            content["flow_loss"] = _finite(scores.flow_loss)
        stem = directory.scores / f"step_{facts['step']:08d}-{facts['set']}-{estimate}"
        _write_array(stem.with_suffix(".npy"), correlations[estimate].r)
        write_json(stem.with_suffix(".json"), content)
        written[estimate] = content
    return written


def summary(correlation: Correlation, subjects: Sequence[str]) -> dict[str, Any]:
    """The part of a score file that follows from r: overall, per subject, TRs, constant parcels."""
    per_subject = {
        label: _finite(r)
        for label, r, n in zip(subjects, correlation.per_subject, correlation.n_trs, strict=True)
        if n > 0
    }
    return {
        "pearson_r": _finite(correlation.overall),
        "per_subject": per_subject,
        "n_trs": int(correlation.n_trs.max(initial=0)),
        "n_constant_parcels": correlation.n_constant,
    }


def lines(score: dict[str, Any]) -> list[str]:
    """The score as it is printed."""
    title = f"Stage {score['stage']}" + (f" Epoch {score['epoch']}" if score["stage"] == 2 else "")
    if score["estimate"] != "mean":
        title += f" (one {score['estimate']})"
    overall = [f"{title} Overall Pearson's r: {printed(score['pearson_r'])}"]
    subjects = [f"{title} - Sub {label} Mean Pearson's r: {printed(r)}" for label, r in score["per_subject"].items()]
    inside = []
    if score.get("pearson_r_subspace") is not None:
        inside = [
            f"{title} r inside the subspace: {printed(score['pearson_r_subspace'])} (the anchor's: "
            f"{printed(score['pearson_r_anchor_subspace'])}; outside and in, the anchor's r is "
            f"{printed(score['pearson_r_anchor'])})"
        ]
    if score.get("flow_loss") is not None:
        inside.append(f"{title} flow matching loss: {score['flow_loss']:.4f}")
    return overall + subjects + inside


def printed(r: float | None) -> str:
    """r with four decimals."""
    return "not a number" if r is None else f"{r:.4f}"


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return float(value) if math.isfinite(value) else None


def _write_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, array)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(buffer.getvalue())
    aside.replace(path)
