"""Stage 2 judged as a distribution: its samples beside those of the Gaussian baselines around the same anchor.

    scores/step_00000500-val-distribution.json   {"samples": K, "flow": {"crps": ...}, "independent": {...}, ...}
    scores/step_00000500-val-distribution.npz    fc_* (V, V), spectrum_* (F,), crps_* (S, V)

Runs are shared by the ranks; K samples of one subject's run are in memory at a time, of two contenders at most. What is
random is keyed by the run's seed, the set, the number of the run in it and the subject.

Functional connectivity and the full covariance are of pairs of parcels: of a wide BOLD they take `evaluate.parcels`
parcels, spread evenly, which `pairs_of_parcels` in the file then says, and `fc_parcels` (P,) beside matrices (P, P).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.study import Study
from trainer.run.directory import StageDirectory
from trainer.scoring import connectivity, proper
from trainer.scoring.baselines import fit_residuals, fit_unknown, unseen
from trainer.scoring.judge import CONTENDERS, REAL, Baselines, Judge, Shown, SubjectJudgement, Sums, Unit
from trainer.scoring.kept import NOTHING_KEPT, Kept
from trainer.scoring.metrics import PearsonR
from trainer.scoring.predictor import FlowPredictor
from trainer.scoring.records import PAIRS, finite
from trainer.scoring.sets import dealt_runs
from trainer.scoring.shares import Ranks, in_order

Subjects = Sequence[tuple[int, SubjectJudgement]]
"""The subjects of one run, in their order."""


@dataclass
class Judgement:
    """What the distribution files of a set hold, and the samples (K, S, 2, T) that are shown."""

    record: dict[str, Any]
    arrays: dict[str, np.ndarray]
    samples: np.ndarray | None


def fit_baselines(
    directory: StageDirectory, predictor: FlowPredictor, study: Study, processes: Ranks
) -> Baselines | None:
    """The baselines of a stage 2, on every rank; None where the anchor has seen all there is."""
    found = unseen(directory, study)
    if found is None:
        return None
    models = fit_residuals(found, study, predictor.anchor, processes)
    return Baselines(fit_unknown(models, found, study, predictor.anchor, processes), found.where)


def judge_distribution(
    predictor: FlowPredictor,
    study: Study,
    set_name: str,
    baselines: Baselines | None,
    shown_run: Shown,
    processes: Ranks,
    kept: Kept = NOTHING_KEPT,
) -> Judgement:
    """Judge evaluate.samples samples of a set, on all ranks; every rank gets the judgement, the same to the bit.

    Subjects' runs that are `kept` are not judged again.

    Raises:
        InputError: on every rank, where one cannot read a shard.
    """
    judge = Judge(predictor, study, set_name, baselines, shown_run, kept, processes)
    spans = [np.flatnonzero(span.subjects).tolist() for span in study.spans[set_name]]
    done: dict[Unit, SubjectJudgement] = processes.first(judge.take_kept)
    missing = [number for number, subjects in enumerate(spans) if any((number, s) not in done for s in subjects)]

    def judge_share() -> list[dict[Unit, SubjectJudgement]]:
        return [judge.run(batch, done) for batch in dealt_runs(study, set_name, processes, "sampling", missing)]

    for judged in in_order(processes, judge_share):
        done |= judged
    runs = [[(s, done[number, s]) for s in subjects] for number, subjects in enumerate(spans)]
    return _judgement(runs, judge.matrices(), judge)


def _judgement(runs: Sequence[Subjects], matrices: Mapping[str, np.ndarray], judge: Judge) -> Judgement:
    """Runs, taken in one after the other, and connectivities (P, P) as what the files hold."""
    study = judge.study
    record: dict[str, Any] = {
        "samples": study.config.evaluate.samples,
        "baselines_fitted_on": None if judge.baselines is None else judge.baselines.fitted_on,
        "variogram_parcels": min(study.manifest.parcels, proper.VARIOGRAM_PARCELS),
        "variogram_trs_per_run": proper.VARIOGRAM_TRS,
        "segment_trs": judge.segment,
    }
    arrays = {"frequency_hz": connectivity.frequencies(judge.segment, study.manifest.tr)}
    if isinstance(judge.parcels, np.ndarray):
        record[PAIRS] = {"taken": len(judge.parcels), "of": study.manifest.parcels}
        arrays["fc_parcels"] = judge.parcels
    whole = {name: _summed_up(runs, name, judge) for name in judge.contenders}
    lengths = (subject.sums[CONTENDERS[0]].n[0] for run in runs for _, subject in run)
    trs = sum(n_trs for n_trs in lengths if n_trs >= judge.segment)
    real = sum(sum(subject.spectrum for _, subject in run) for run in runs) / trs
    arrays |= {f"fc_{REAL}": matrices[REAL], f"spectrum_{REAL}": real}
    for name, sums in whole.items():
        power = sums.spectrum / trs
        fc_r, fc_error = connectivity.compare(matrices[name], matrices[REAL])
        record[name] = {
            **sums.record(),
            "fc_r": finite(fc_r),
            "fc_error": finite(fc_error),
            "spectrum_error": finite(connectivity.spectrum_error(power, real)),
        }
        arrays |= {f"fc_{name}": matrices[name], f"spectrum_{name}": power, f"crps_{name}": sums.crps_of_parcels()}
    record[CONTENDERS[0]]["r_mean_of_k"] = finite(_mean_of_k(runs, study).compute().overall)
    return Judgement(record, arrays, _shown(runs[judge.shown.run], len(study.manifest.subjects)))


def _summed_up(runs: Sequence[Subjects], name: str, judge: Judge) -> Sums:
    """The sums of one contender over all runs."""
    shape = len(judge.study.manifest.subjects), judge.study.manifest.parcels, judge.segment // 2
    whole = Sums(*shape)
    for run in runs:
        sums = Sums(*shape)
        for s, subject in run:
            sums.merge_subject(s, subject.sums[name])
        whole.merge(sums)
    return whole


def _mean_of_k(runs: Sequence[Subjects], study: Study) -> PearsonR:
    """The mean of K samples against BOLD over all runs."""
    whole = PearsonR(len(study.manifest.subjects), study.manifest.parcels)
    for run in runs:
        for s, subject in run:
            whole.merge_subject(s, subject.mean_of_k, 0)
    return whole


def _shown(run: Subjects, n_subjects: int) -> np.ndarray | None:
    """(K, S, 2, T) samples of the run that is shown; NaN for who has no BOLD of it."""
    there = {s: subject.shown for s, subject in run if subject.shown is not None}
    if not there:
        return None
    nothing = np.full_like(next(iter(there.values())), np.nan)
    return np.stack([there.get(s, nothing) for s in range(n_subjects)], axis=1)
