"""One checkpoint and some sets make score files, with the r of every parcel beside them.

A training scores plainly (r); `evaluate` and `watch` score in full, with all that `full` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from trainer.data.study import Study
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.scoring import full as beyond
from trainer.scoring.ceilings import write_ceilings
from trainer.scoring.predictor import load_predictor
from trainer.scoring.records import lines, stem, write_array, write_scores
from trainer.scoring.sets import ESTIMATES, NO_DETAILS, SetScores, score_set
from trainer.scoring.shares import Ranks


def score_checkpoint(
    directory: StageDirectory,
    stage: int,
    step: int,
    study: Study,
    sets: Sequence[str],
    processes: Ranks,
    say: Callable[[str], None],
    *,
    full: bool,
) -> None:
    """Score one checkpoint on some sets; the main process writes the score files and prints them through `say`.

    Args:
        full: all there is to say, as the workers do; False: r alone, as a training does.

    Raises:
        InputError: the checkpoint is missing, damaged, or does not fit the shards.
    """
    predictor = load_predictor(directory, stage, step, study, processes.device, ESTIMATES[:stage])
    epoch = step // checkpoint.read_meta(checkpoint.folder_of(directory.checkpoints, step))["steps_per_epoch"]
    for set_name in sets:
        details = beyond.details_of(study, set_name) if full else NO_DETAILS
        scores = score_set(predictor, study, set_name, processes, details)
        facts = {"stage": stage, "step": step, "set": set_name, "epoch": epoch, "validation": False}
        more: dict[str, dict[str, Any]] = {}
        arrays: dict[str, np.ndarray] = {}
        if full:
            ceiling = write_ceilings(directory, study, set_name, processes)
            more, arrays = _judge(scores, ceiling, study, set_name, processes)
        processes.first(partial(_record, directory, scores, study.manifest.subjects, facts, more, arrays, say))


def _judge(
    scores: SetScores, ceiling: np.ndarray | None, study: Study, set_name: str, processes: Ranks
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """What goes into the score file of each estimate beyond r, and the arrays beside it."""
    subjects = study.manifest.subjects
    samples = [study.manifest.samples[span.sample] for span in study.spans[set_name]]
    resampled = beyond.resample(scores, study, set_name, processes)
    more: dict[str, dict[str, Any]] = {}
    for estimate in scores.estimates:
        more[estimate] = {**beyond.part_keys(scores, estimate, samples), "full": True}
        if estimate in resampled:
            more[estimate] |= beyond.interval_keys(scores, estimate, resampled[estimate], subjects)
        if ceiling is not None:
            more[estimate] |= beyond.ceiling_keys(scores, estimate, ceiling)
    return more, {f"{estimate}-bootstrap": values for estimate, values in resampled.items()}


def _record(
    directory: StageDirectory,
    scores: SetScores,
    subjects: Sequence[str],
    facts: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
    say: Callable[[str], None],
) -> None:
    """Write and print the scores of a set."""
    begin = stem(directory, facts["step"], facts["set"])
    for name, array in arrays.items():
        write_array(begin.with_name(f"{begin.name}-{name}.npy"), array)
    for estimate, score in write_scores(directory, scores, subjects, facts, more).items():
        say(f"-- {facts['set']}, {estimate}, step {facts['step']} ({directory.scores})")
        say("\n".join(lines(score)))
