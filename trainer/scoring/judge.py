"""One subject's run judged: samples of the flow and of the baselines beside the real BOLD.

What is judged is kept subject by subject, with the connectivities in files of their own: these are sums over all that a
process has judged, (P, P) for each contender, which would be too large to be kept for every run.

    judged-00003-002.npz            what subject 2 of run 3 adds
    connectivity-OWNER.npz          sums over the (run, subject) pairs that the file names
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from trainer.data.batches import Batch
from trainer.data.study import Study
from trainer.progress import alive, watched
from trainer.scoring import connectivity, proper
from trainer.scoring.baselines import ResidualModel
from trainer.scoring.connectivity import Connectivity
from trainer.scoring.kept import Arrays, Kept, filled, named
from trainer.scoring.metrics import PearsonR
from trainer.scoring.predictor import Draws, FlowPredictor
from trainer.scoring.records import finite
from trainer.scoring.shares import Ranks, summed

CONTENDERS = ("flow", "independent", "full_covariance")
REAL = "bold"
KEEP_EVERY_S = 15.0
"""Connectivities are kept at the end of each run, and between its subjects where so much time has passed."""

Unit = tuple[int, int]
"""The number of a run in its set, and of a subject."""


@dataclass(frozen=True)
class Baselines:
    """The residuals of each subject (None: unknown), and the TRs that they were fitted on."""

    models: Sequence[ResidualModel | None]
    fitted_on: str


@dataclass(frozen=True)
class Shown:
    """The run whose samples are kept to be looked at, and parcels (S, 2) of each subject, -1 where there is none."""

    run: int
    parcels: np.ndarray


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

    def merge_subject(self, subject: int, other: Sums) -> None:
        """Take in what another has seen of one subject alone."""
        self.covered[:, subject] += other.covered[:, 0]
        self.spectrum += other.spectrum
        for name in ("crps", "energy", "variogram", "n", "n_variogram"):
            vars(self)[name][subject] += vars(other)[name][0]

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
class SubjectJudgement:
    """What one subject's run adds.

    sums: of each contender, of one subject.
    mean_of_k: the mean of K samples against BOLD, of one subject.
    spectrum: (F,) of the real BOLD, times TRs.
    shown: (K, 2, T) samples of the parcels that are shown, in the run that is.
    """

    sums: dict[str, Sums]
    mean_of_k: PearsonR
    spectrum: np.ndarray
    shown: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name, to be kept."""
        found = {"spectrum": self.spectrum, **named("mean_of_k", self.mean_of_k)}
        for name, sums in self.sums.items():
            found |= named(name, sums)
        return found if self.shown is None else {**found, "shown": self.shown}

    @classmethod
    def of(cls, arrays: Arrays) -> SubjectJudgement:
        """What `arrays` gave."""
        names = [name for name in CONTENDERS if f"{name}/n" in arrays]
        sums = {name: filled(Sums(0, 0, 0), name, arrays) for name in names}
        mean_of_k = filled(PearsonR(0, 0), "mean_of_k", arrays)
        return cls(sums, mean_of_k, arrays["spectrum"], arrays.get("shown"))


@dataclass
class Judge:
    """Judges runs of one set, and keeps what it has judged; `connectivities` sums up what this process has seen.

    `parcels` are those whose pairs are looked at: all, or as many as evaluate.parcels says.
    """

    predictor: FlowPredictor
    study: Study
    set_name: str
    baselines: Baselines | None
    shown: Shown
    kept: Kept
    processes: Ranks
    connectivities: dict[str, Connectivity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_parcels, most = self.study.manifest.parcels, self.study.config.evaluate.parcels
        self.parcels = slice(None) if n_parcels <= most else proper.spread_evenly(n_parcels, most)
        self.contenders = CONTENDERS if self.baselines is not None else CONTENDERS[:1]
        self.connectivities, self._before = self._nothing(), self._nothing()
        self.segment = connectivity.segment_trs([len(span) for span in self.study.spans[self.set_name]])
        self._judged: list[Unit] = []
        self._written = time.monotonic()

    def _nothing(self) -> dict[str, Connectivity]:
        n_parcels = min(self.study.manifest.parcels, self.study.config.evaluate.parcels)
        return {name: Connectivity(n_parcels) for name in (REAL, *self.contenders)}

    def run(self, batch: Batch, done: Mapping[Unit, SubjectJudgement]) -> dict[Unit, SubjectJudgement]:
        """Judge a batch of one run, all of its subjects that are not done."""
        number = int(batch.windows[0])
        wanted = torch.tensor([(number, s) not in done for s in range(batch.subject_mask.shape[1])])
        batch = replace(batch, subject_mask=batch.subject_mask & wanted.to(batch.subject_mask.device))
        found = {}
        draws = self.predictor.draws(batch, self.study.config.evaluate.samples)
        for each in watched(draws, "subjects", int(batch.subject_mask.sum()), visible=self.processes.is_main):
            unit = number, each.subject
            found[unit] = self._subject(each, number)
            self._keep(unit, found[unit])
        self._keep_connectivities()
        return found

    def _subject(self, draws: Draws, number: int) -> SubjectJudgement:
        """Judge one subject's run."""
        n_parcels, n_frequencies = self.study.manifest.parcels, self.segment // 2
        found = SubjectJudgement({}, PearsonR(1, n_parcels), self._spectrum(draws.bold) * len(draws.bold))
        for name, samples in self._contenders(draws, number):
            found.sums[name] = Sums(1, n_parcels, n_frequencies)
            found.sums[name].add(0, samples, draws.bold, self._spectrum(samples))
            self._connect(name, samples)
            del samples  # before the next ones are drawn
        self._connect(REAL, draws.bold[None])
        mean, bold = (torch.from_numpy(values)[None, None] for values in (draws.samples.mean(axis=0), draws.bold))
        found.mean_of_k.update(mean, bold, torch.ones(bold.shape[:3], dtype=torch.bool))
        if number == self.shown.run:
            places = self.shown.parcels[draws.subject]
            found.shown = np.stack(
                [draws.samples[:, :, p] if p >= 0 else np.full(draws.samples.shape[:2], np.nan) for p in places], axis=1
            )
        return found

    def _contenders(self, draws: Draws, number: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, samples (K, T, V)) of each; both baselines with the same random numbers."""
        yield CONTENDERS[0], draws.samples
        if self.baselines is not None:
            for name in CONTENDERS[1:]:
                yield name, self._baseline(name, self.baselines.models[draws.subject], draws, number)

    def _baseline(self, name: str, model: ResidualModel | None, draws: Draws, number: int) -> np.ndarray:
        """Samples of a baseline; not numbers where it does not know the subject."""
        if model is None:
            return np.full_like(draws.samples, np.nan)
        key = [self.study.config.seed, number, draws.subject, *self.set_name.encode()]
        count, n_trs, _ = draws.samples.shape
        drawn = model.draw(count, n_trs, np.random.default_rng(key), full=name == "full_covariance")
        drawn += draws.anchor
        return drawn

    def _spectrum(self, series: np.ndarray) -> np.ndarray:
        return connectivity.spectrum(series, self.segment, self.study.manifest.tr)

    def _connect(self, name: str, samples: np.ndarray) -> None:
        """Take in the functional connectivity of samples (K, T, V), the mean of each sample's; one TR has none."""
        if samples.shape[1] < 2:
            return
        total = np.zeros_like(self.connectivities[name].total, np.float64)
        for sample in samples:
            total += connectivity.correlations(sample[:, self.parcels])
            alive()
        self.connectivities[name].add(total / len(samples), samples.shape[1])

    def _keep(self, unit: Unit, judged: SubjectJudgement) -> None:
        """Keep what was judged; it counts once the connectivities are kept that contain it."""
        self.kept.write("judged-{:05d}-{:03d}".format(*unit), judged.arrays())
        self._judged.append(unit)
        if time.monotonic() - self._written > KEEP_EVERY_S:
            self._keep_connectivities()

    def _keep_connectivities(self) -> None:
        arrays = {"units": np.array(self._judged, int).reshape(-1, 2)}
        for name, seen in self.connectivities.items():
            arrays |= named(name, seen)
        self.kept.write(f"connectivity-{self.kept.owner}", arrays)
        self._written = time.monotonic()

    def take_kept(self) -> dict[Unit, SubjectJudgement]:
        """What an interrupted scoring has kept, whose connectivities are from now on a part of this one's sums."""
        found: dict[Unit, SubjectJudgement] = {}
        for name in self.kept.names("connectivity"):
            sums = self.kept.read(name)
            units: list[Unit] = [] if sums is None else [(int(run), int(s)) for run, s in sums["units"]]
            pieces = {unit: self.kept.read("judged-{:05d}-{:03d}".format(*unit)) for unit in units}
            if sums is None or not found.keys().isdisjoint(units) or None in pieces.values():
                continue  # two processes judged the same at the same time, or a file is gone: it is judged again
            found |= {unit: SubjectJudgement.of(arrays) for unit, arrays in pieces.items() if arrays is not None}
            for contender, before in self._before.items():
                before.merge(filled(Connectivity(0), contender, sums))
        return found

    def matrices(self) -> dict[str, np.ndarray]:
        """The mean connectivities (P, P) of all that all ranks have seen or taken, on every rank."""
        found = {}
        for name, seen in self.connectivities.items():
            seen.merge(self._before.pop(name))
            whole = Connectivity(0)
            whole.total = summed(self.processes, seen.total)
            whole.weight = sum(self.processes.gather_objects(seen.weight))
            whole.spoilt = np.any(self.processes.gather_objects(seen.spoilt), axis=0)
            found[name] = whole.mean()
        return found
