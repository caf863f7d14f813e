"""One checkpoint and some sets make score files, with arrays and further judgements beside them.

    scores/step_00000500-val-mean.json      r, and in full what `full` knows (one file for each estimate)
    scores/step_00000500-val-series.npz     in full: BOLD, prediction and samples of a few parcels in the longest run
    scores/step_00000500-val-distribution.* in full, stage 2: its samples as a distribution
    scores/partial/                         in full, until the files above are there: what is scored so far

A training scores plainly (r); `evaluate` and `watch` score in full.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from trainer.data.study import Study
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.run.files import write_json
from trainer.scoring import full as beyond
from trainer.scoring.ceilings import write_ceilings
from trainer.scoring.distribution import Baselines, Judgement, Shown, fit_baselines, judge_distribution
from trainer.scoring.kept import NOTHING_KEPT, Kept, kept_of
from trainer.scoring.predictor import TRAINED, FlowPredictor, Predictor, load_predictor
from trainer.scoring.records import PAIRS, lines, stem, write_array, write_arrays, write_scores
from trainer.scoring.rsa import Groups, groups_of
from trainer.scoring.sets import ESTIMATES, SetScores, score_set
from trainer.scoring.shares import Ranks


@dataclass
class Findings:
    """What a full scoring adds to the scores of a set.

    keys: estimate -> keys of its score file.
    bootstrap: estimate -> (B, S).
    """

    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    bootstrap: dict[str, np.ndarray] = field(default_factory=dict)
    series: dict[str, np.ndarray] = field(default_factory=dict)
    distribution: Judgement | None = None

    def note_pairs(self) -> None:
        """Say in the score files too that the pairs of some parcels only were judged."""
        if self.distribution is not None and PAIRS in self.distribution.record:
            for keys in self.keys.values():
                keys[PAIRS] = self.distribution.record[PAIRS]


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
        InputError: the checkpoint is missing, damaged, or does not fit the shards; evaluate.labels does not.
    """
    groups = groups_of(study) if full else {}
    predictor = load_predictor(directory, stage, step, study, processes.device, ESTIMATES[:stage])
    meta = checkpoint.read_meta(checkpoint.folder_of(directory.checkpoints, step))
    epoch = step // meta["steps_per_epoch"]
    baselines = None
    if full and isinstance(predictor, FlowPredictor) and study.config.evaluate.samples:
        baselines = fit_baselines(directory, predictor, study, processes)
    for set_name in sets:
        facts = {"stage": stage, "step": step, "set": set_name, "epoch": epoch, "validation": False}
        facts |= untrained_facts(study, set_name, meta.get(TRAINED, study.manifest.subjects))
        facts["data"] = study.digest(set_name)
        if full:
            ceiling = write_ceilings(directory, study, set_name, processes)
            kept = kept_of(directory, stage, step, set_name, study, groups, processes)
            processes.first(kept.begin)
            details = beyond.details_of(study, set_name, groups)
            scores = score_set(predictor, study, set_name, processes, details, kept)
            findings = _find(predictor, scores, groups, ceiling, baselines, study, set_name, processes, kept)
        else:
            kept = NOTHING_KEPT
            scores, findings = score_set(predictor, study, set_name, processes), Findings()
        processes.first(partial(_record, directory, scores, study.manifest.subjects, facts, findings, say))
        processes.first(kept.remove)


def untrained_facts(study: Study, set_name: str, trained: Collection[str]) -> dict[str, list[str]]:
    """What a score file says of the subjects of its set that were not trained; nothing where all were."""
    untrained = study.untrained(set_name, trained)
    return {"untrained_subjects": untrained} if untrained else {}


def _find(
    predictor: Predictor,
    scores: SetScores,
    groups: Groups,
    ceiling: np.ndarray | None,
    baselines: Baselines | None,
    study: Study,
    set_name: str,
    processes: Ranks,
    kept: Kept,
) -> Findings:
    """All there is to say of a set beyond r, on every rank."""
    found = Findings(bootstrap=beyond.resample(scores, study, set_name, processes))
    for estimate in scores.estimates:
        found.keys[estimate] = beyond.keys_of(
            scores, estimate, study, set_name, groups, ceiling, found.bootstrap, processes
        )
    lengths = [len(span) for span in study.spans[set_name]]
    shown = Shown(beyond.longest(lengths), beyond.shown_parcels(scores.correlations["mean"].r))
    if isinstance(predictor, FlowPredictor) and study.config.evaluate.samples:
        found.distribution = judge_distribution(predictor, study, set_name, baselines, shown, processes, kept)
        found.note_pairs()
    samples = None if found.distribution is None else found.distribution.samples
    found.series = beyond.series_of(scores, study, set_name, shown, samples)
    return found


def _record(
    directory: StageDirectory,
    scores: SetScores,
    subjects: Sequence[str],
    facts: Mapping[str, Any],
    findings: Findings,
    say: Callable[[str], None],
) -> None:
    """Write and print the scores of a set. The score files come last: where they are full, the others are there."""
    begin = stem(directory, facts["step"], facts["set"])
    for estimate, resampled in findings.bootstrap.items():
        write_array(begin.with_name(f"{begin.name}-{estimate}-bootstrap.npy"), resampled)
    if findings.series:
        write_arrays(begin.with_name(f"{begin.name}-series.npz"), findings.series)
    if findings.distribution is not None:
        write_arrays(begin.with_name(f"{begin.name}-distribution.npz"), findings.distribution.arrays)
        known = {key: facts[key] for key in ("stage", "step", "set")}
        write_json(begin.with_name(f"{begin.name}-distribution.json"), {**known, **findings.distribution.record})
    for estimate, score in write_scores(directory, scores, subjects, facts, findings.keys).items():
        say(f"-- {facts['set']}, {estimate}, step {facts['step']} ({directory.scores})")
        say("\n".join(lines(score)))
