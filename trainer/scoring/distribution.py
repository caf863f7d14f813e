"""Stage 2 judged as a distribution: its samples beside those of the Gaussian baselines around the same anchor.

    scores/step_00000500-val-distribution.json   {"samples": K, "flow": {"crps": ...}, "independent": {...}, ...}
    scores/step_00000500-val-distribution.npz    fc_* (V, V), spectrum_* (F,), crps_* (S, V)

Runs are shared by the ranks; K samples of one subject's run are in memory at a time. What is random is keyed by the
run's seed, the set, the number of the run in it and the subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer.data.batches import Batch
from trainer.data.study import Study
from trainer.run.directory import StageDirectory
from trainer.scoring import connectivity, proper
from trainer.scoring.baselines import ResidualModel, fit_residuals, fit_unknown, unseen
from trainer.scoring.connectivity import Connectivity
from trainer.scoring.metrics import PearsonR, merged
from trainer.scoring.predictor import Draws, FlowPredictor
from trainer.scoring.records import finite
from trainer.scoring.sets import dealt_runs
from trainer.scoring.shares import Ranks, in_order

CONTENDERS = ("flow", "independent", "full_covariance")
REAL = "bold"


@dataclass(frozen=True)
class Baselines:
    """The residuals of each subject (None: unknown), and the TRs that they were fitted on."""

    models: Sequence[ResidualModel | None]
    fitted_on: str


def fit_baselines(
    directory: StageDirectory, predictor: FlowPredictor, study: Study, processes: Ranks
) -> Baselines | None:
    """The baselines of a stage 2, on every rank; None where the anchor has seen all there is."""
    found = unseen(directory, study)
    if found is None:
        return None
    models = fit_residuals(found, study, predictor.anchor, processes)
    return Baselines(fit_unknown(models, found, study, predictor.anchor, processes), found.where)


class Sums:
    """Sums over the TRs of some runs of what one contender's samples are worth, for each subject.

    Attributes:
        crps: (S, V); energy, variogram: (S,); covered: (levels, S); n, n_variogram: (S,) TRs; spectrum: (F,) of all
            subjects.
    """

    def __init__(self, n_subjects: int, n_parcels: int, n_frequencies: int) -> None:
        self.crps = np.zeros((n_subjects, n_parcels))
        self.energy, self.variogram = np.zeros(n_subjects), np.zeros(n_subjects)
        self.covered = np.zeros((len(proper.LEVELS), n_subjects))
        self.n, self.n_variogram = np.zeros(n_subjects), np.zeros(n_subjects)
        self.spectrum = np.zeros(n_frequencies)

    def add(self, subject: int, samples: np.ndarray, bold: np.ndarray, power: np.ndarray) -> None:
        """Take in samples (K, T, V) of one run."""
        n_trs, parcels = bold.shape
        trs = proper.spread_evenly(n_trs, proper.VARIOGRAM_TRS)
        some = proper.spread_evenly(parcels, proper.VARIOGRAM_PARCELS)
        with np.errstate(invalid="ignore"):  # what is not a number makes its means so
            self.crps[subject] += proper.crps(samples, bold).sum(axis=0)
            self.energy[subject] += proper.energy_score(samples, bold).sum()
            pairs = proper.variogram_score(samples[:, trs][:, :, some], bold[trs][:, some])
        self.variogram[subject] += pairs.sum()
        self.covered[:, subject] += proper.coverage(samples, bold).mean(axis=2).sum(axis=1)
        self.n[subject] += n_trs
        self.n_variogram[subject] += len(trs)
        self.spectrum += power * n_trs

    def merge(self, other: Sums) -> None:
        """Take in what another has seen."""
        for name, values in vars(other).items():
            vars(self)[name] += values

    def record(self) -> dict[str, float | None]:
        """Means over TRs (and parcels), then over the subjects that have any."""
        there = self.n > 0
        n = self.n[there]
        found = {
            "crps": (self.crps[there].mean(axis=1) / n).mean(),
            "energy": (self.energy[there] / n).mean(),
            "variogram": (self.variogram[there] / self.n_variogram[there]).mean(),
        }
        for level, covered in zip(proper.LEVELS, self.covered, strict=True):
            found[f"coverage_{level * 100:.0f}"] = (covered[there] / n).mean()
        return {name: finite(value) for name, value in found.items()}

    def crps_of_parcels(self) -> np.ndarray:
        """(S, V); NaN for a subject without TRs."""
        n = np.where(self.n > 0, self.n, np.nan)
        return self.crps / n[:, None]


@dataclass
class RunJudgement:
    """What one run adds: sums of each contender, the mean of K samples against BOLD, the real spectrum.

    shown: (K, S, 2, T) samples of the parcels that are shown, in the run that is.
    """

    sums: dict[str, Sums]
    mean_of_k: PearsonR
    spectrum: np.ndarray
    shown: np.ndarray | None = None


@dataclass(frozen=True)
class Shown:
    """The run whose samples are kept to be looked at, and parcels (S, 2) of each subject, -1 where there is none."""

    run: int
    parcels: np.ndarray


@dataclass
class Judgement:
    """What the distribution files of a set hold, and the samples (K, S, 2, T) that are shown."""

    record: dict[str, Any]
    arrays: dict[str, np.ndarray]
    samples: np.ndarray | None


@dataclass
class Judge:
    """Judges runs of one set; `connectivities` sums up what it has seen of each contender and of the real BOLD."""

    predictor: FlowPredictor
    study: Study
    set_name: str
    baselines: Baselines | None
    shown: Shown
    connectivities: dict[str, Connectivity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = CONTENDERS if self.baselines is not None else CONTENDERS[:1]
        self.connectivities = {name: Connectivity(self.study.manifest.parcels) for name in (REAL, *names)}
        self.segment = connectivity.segment_trs(min(len(span) for span in self.study.spans[self.set_name]))

    def run(self, batch: Batch) -> RunJudgement:
        """Judge a batch of one run."""
        manifest, number = self.study.manifest, int(batch.windows[0])
        shape = len(manifest.subjects), manifest.parcels
        found = RunJudgement({}, PearsonR(*shape), np.zeros(self.segment // 2))
        for draws in self.predictor.draws(batch, self.study.config.evaluate.samples):
            for name, samples in self._contenders(draws, number):
                sums = found.sums.setdefault(name, Sums(*shape, self.segment // 2))
                sums.add(draws.subject, samples, draws.bold, self._spectrum(samples))
                self._connect(name, samples)
            self._connect(REAL, draws.bold[None])
            found.spectrum += self._spectrum(draws.bold) * len(draws.bold)
            found.mean_of_k.merge(_correlated(draws, *shape))
            if number == self.shown.run:
                self._show(found, draws)
        return found

    def _contenders(self, draws: Draws, number: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, samples (K, T, V)) of each; both baselines with the same random numbers."""
        yield CONTENDERS[0], draws.samples
        if self.baselines is None:
            return
        model = self.baselines.models[draws.subject]
        for name in CONTENDERS[1:]:
            if model is None:
                yield name, np.full_like(draws.samples, np.nan)
                continue
            key = [self.study.config.seed, number, draws.subject, *self.set_name.encode()]
            count, n_trs, _ = draws.samples.shape
            residuals = model.draw(count, n_trs, np.random.default_rng(key), full=name == "full_covariance")
            yield name, draws.anchor + residuals

    def _spectrum(self, series: np.ndarray) -> np.ndarray:
        return connectivity.spectrum(series, self.segment, self.study.manifest.tr)

    def _connect(self, name: str, samples: np.ndarray) -> None:
        """Take in the functional connectivity of samples (K, T, V), the mean of each sample's."""
        total = np.zeros((samples.shape[2], samples.shape[2]))
        for sample in samples:
            total += connectivity.correlations(sample)
        self.connectivities[name].add(total / len(samples), samples.shape[1])

    def _show(self, found: RunJudgement, draws: Draws) -> None:
        """Keep the samples of the parcels that are shown."""
        count, n_trs, _ = draws.samples.shape
        if found.shown is None:
            found.shown = np.full((count, *self.shown.parcels.shape, n_trs), np.nan)
        for place, parcel in enumerate(self.shown.parcels[draws.subject]):
            if parcel >= 0:
                found.shown[:, draws.subject, place] = draws.samples[:, :, parcel]


def _correlated(draws: Draws, n_subjects: int, n_parcels: int) -> PearsonR:
    """The mean of the samples against BOLD."""
    found = PearsonR(n_subjects, n_parcels)
    valid = torch.zeros(1, n_subjects, len(draws.bold), dtype=torch.bool)
    valid[:, draws.subject] = True
    shape = 1, n_subjects, *draws.bold.shape
    mean = torch.from_numpy(draws.samples.mean(axis=0)).expand(shape)
    found.update(mean, torch.from_numpy(draws.bold).expand(shape), valid)
    return found


def judge_distribution(
    predictor: FlowPredictor,
    study: Study,
    set_name: str,
    baselines: Baselines | None,
    shown_run: Shown,
    processes: Ranks,
) -> Judgement:
    """Judge evaluate.samples samples of a set, on all ranks; every rank gets the judgement, the same to the bit.

    Raises:
        InputError: on every rank, where one cannot read a shard.
    """
    judge = Judge(predictor, study, set_name, baselines, shown_run)

    def judge_share() -> list[RunJudgement]:
        return [judge.run(batch) for batch in dealt_runs(study, set_name, processes, "sampling")]

    runs = in_order(processes, judge_share)
    connectivities = {name: Connectivity(study.manifest.parcels) for name in judge.connectivities}
    for seen in processes.gather_objects(judge.connectivities):
        for name, whole in connectivities.items():
            whole.merge(seen[name])
    return _judgement(runs, {name: whole.mean() for name, whole in connectivities.items()}, judge)


def _judgement(runs: Sequence[RunJudgement], matrices: Mapping[str, np.ndarray], judge: Judge) -> Judgement:
    """Runs, taken in one after the other, and connectivities (V, V) as what the files hold."""
    study = judge.study
    record: dict[str, Any] = {
        "samples": study.config.evaluate.samples,
        "baselines_fitted_on": None if judge.baselines is None else judge.baselines.fitted_on,
        "variogram_parcels": min(study.manifest.parcels, proper.VARIOGRAM_PARCELS),
        "variogram_trs_per_run": proper.VARIOGRAM_TRS,
        "segment_trs": judge.segment,
    }
    arrays = {"frequency_hz": connectivity.frequencies(judge.segment, study.manifest.tr)}
    trs = sum(run.sums[CONTENDERS[0]].n.sum() for run in runs)
    real = sum(run.spectrum for run in runs) / trs
    arrays |= {f"fc_{REAL}": matrices[REAL], f"spectrum_{REAL}": real}
    for name in runs[0].sums:
        sums = runs[0].sums[name]
        for run in runs[1:]:
            sums.merge(run.sums[name])
        power = sums.spectrum / trs
        fc_r, fc_error = connectivity.compare(matrices[name], matrices[REAL])
        record[name] = {
            **sums.record(),
            "fc_r": finite(fc_r),
            "fc_error": finite(fc_error),
            "spectrum_error": finite(connectivity.spectrum_error(power, real)),
        }
        arrays |= {f"fc_{name}": matrices[name], f"spectrum_{name}": power, f"crps_{name}": sums.crps_of_parcels()}
    record[CONTENDERS[0]]["r_mean_of_k"] = finite(merged([run.mean_of_k for run in runs]).compute().overall)
    kept = [run.shown for run in runs if run.shown is not None]
    return Judgement(record, arrays, kept[0] if kept else None)
