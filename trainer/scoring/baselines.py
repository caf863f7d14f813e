"""What a flow must beat: the anchor with Gaussian residuals around it, fitted on TRs that the anchor has not seen.

A parcel's residual e = BOLD - anchor follows e_t = phi e_{t-1} + w_t, with w_t ~ N(0, Q): `independent` with Q
diagonal, `full_covariance` with all of Q, which is shrunk towards its diagonal as far as its noise asks for (Ledoit
and Wolf 2004, J. Multivar. Anal. 88, 365), so that it is positive definite however few the TRs are. Both have the same
phi, the same variances of w and the same random numbers. Residuals are not centred: what the anchor is off on average
in unseen runs is part of what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from trainer.data.batches import whole_runs
from trainer.data.manifest import Manifest
from trainer.data.plan import Span
from trainer.data.study import Study
from trainer.models.anchor import Anchor
from trainer.run.directory import StageDirectory
from trainer.scoring.predictor import anchored
from trainer.scoring.shares import Ranks, in_order

MOST_TRS = 20_000
"""TRs that a subject's residuals are fitted to; of more, runs spread evenly are taken."""

_LARGEST_PHI = 0.99
_LEAST_SHRINKAGE = 1e-6


class StoredPredictions(Mapping[int, np.ndarray]):
    """What anchors predicted for samples that they had not seen, as stage 2 found it: sample index -> (S, T, V)."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def _path(self, sample: int) -> Path:
        return self.folder / f"{self.manifest.file_stems[sample]}.npy"

    def __getitem__(self, sample: int) -> np.ndarray:
        return np.load(self._path(sample), mmap_mode="r")

    def __iter__(self) -> Iterator[int]:
        return (sample for sample in range(len(self.manifest.samples)) if self._path(sample).exists())

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Unseen:
    """TRs that an anchor has not been trained on, with what it predicts for them.

    Attributes:
        where: what they are, in words.
        spans: runs or parts of runs.
        stored: predictions of the runs, or None where `anchor` predicts them.
    """

    where: str
    spans: Sequence[Span]
    stored: StoredPredictions | None = None

    def residuals(self, study: Study, anchor: Anchor, subject: int, device: torch.device) -> Iterator[np.ndarray]:
        """BOLD - prediction (T, V) float64 of one subject, run by run."""
        alone = tuple(s == subject for s in range(len(study.manifest.subjects)))
        spans = [replace(span, subjects=alone) for span in self.spans if span.subjects[subject]]
        kept = spans[:: -(-sum(map(len, spans)) // MOST_TRS)] if spans else []
        if self.stored is not None:
            for batch in whole_runs(study.shards, kept, [], study.scaling, anchor=self.stored):
                assert batch.anchor is not None
                yield (batch.bold[0, subject].double() - batch.anchor[0, subject]).numpy()
            return
        context = study.config.data.context_trs
        for batch in whole_runs(study.shards, kept, study.streams, study.scaling, context=context):
            with torch.no_grad():
                mu, scored = anchored(anchor.eval(), batch.to(device))
            yield (scored.bold[0, subject].double() - mu[0, subject]).cpu().numpy()


def unseen(directory: StageDirectory, study: Study) -> Unseen | None:
    """The TRs that the residuals of a stage 2 are fitted on.

    Cross-fitted predictions of the training TRs. Without them (cross_fit 0, an imported run) the first half of each
    validation run: scored on the validation set itself, the baselines have then seen half of it, and look a little too
    good. A refit without cross-fit has nothing left that it has not seen: None, and there are no baselines.
    """
    refit = directory.path.name == "refit"
    stored = StoredPredictions(directory.anchor / "predictions", study.manifest)
    there = set(stored) if study.config.stage2.cross_fit else set()
    spans = [span for span in study.training_spans(refit=refit) if span.sample in there]
    if spans:
        return Unseen("training TRs, predicted by anchors of other folds", spans, stored)
    if refit:
        return None
    name = study.config.val_set_name
    halves = [replace(span, stop=(span.start + span.stop) // 2) for span in study.spans[name] if len(span) > 1]
    return Unseen(f"the first half of each run of {name}", halves) if halves else None


@dataclass(frozen=True)
class ResidualModel:
    """The AR(1) processes of one subject's residuals.

    Attributes:
        phi: (V,) what a residual keeps of the one before.
        scale: (V,) standard deviations of w.
        correlation: (V, V) of w, positive definite.
    """

    phi: np.ndarray
    scale: np.ndarray
    correlation: np.ndarray

    def draw(self, count: int, n_trs: int, generator: np.random.Generator, *, full: bool) -> np.ndarray:
        """(K, T, V) float64 residuals, stationary from the first TR on; `full`: with all of the covariance.

        The covariance of e is that of w over 1 - phi_i phi_j, a positive definite matrix (Schur's product of two).
        """
        parcels = len(self.phi)
        normal = generator.standard_normal((n_trs, count, parcels))
        stationary = np.sqrt(1 - self.phi**2)
        if full:
            first, later = self._roots
            normal[0] = normal[0] @ first.T
            normal[1:] = normal[1:] @ later.T
        drawn = normal * self.scale
        drawn[0] /= stationary
        for t in range(1, n_trs):
            drawn[t] += self.phi * drawn[t - 1]
        return drawn.transpose(1, 0, 2)

    @cached_property
    def _roots(self) -> tuple[np.ndarray, np.ndarray]:
        """Cholesky factors of the correlations of e and of w."""
        stationary = np.sqrt(1 - self.phi**2)
        of_e = self.correlation * np.outer(stationary, stationary) / (1 - np.outer(self.phi, self.phi))
        return np.linalg.cholesky(of_e), np.linalg.cholesky(self.correlation)


def fit_residuals(found: Unseen, study: Study, anchor: Anchor, processes: Ranks) -> list[ResidualModel | None]:
    """The residuals of every subject, on every rank; the ranks share the subjects.

    None for a subject without two TRs in a row that the anchor predicts in numbers.

    Raises:
        InputError: on every rank, where one cannot read a shard.
    """

    def fit_share() -> list[ResidualModel | None]:
        subjects = processes.share(range(len(study.manifest.subjects)))
        return [fit(partial(found.residuals, study, anchor, s, processes.device)) for s in subjects]

    return in_order(processes, fit_share)


def fit(residuals: Callable[[], Iterable[np.ndarray]]) -> ResidualModel | None:
    """Fit AR(1) processes to runs of residuals (T, V), which are gone through twice.

    None where no two TRs in a row are numbers.
    """
    pairs = 0
    squares = products = before = np.zeros(0)
    for earlier, later in _steps(residuals()):
        if not pairs:
            squares, products, before = (np.zeros(later.shape[1]) for _ in range(3))
        pairs += len(later)
        squares += np.square(later).sum(axis=0)
        products += (later * earlier).sum(axis=0)
        before += np.square(earlier).sum(axis=0)
    if not pairs:
        return None
    phi = np.divide(products, before, out=np.zeros_like(before), where=before > 0)
    phi = np.clip(phi, -_LARGEST_PHI, _LARGEST_PHI)
    scale = np.sqrt(np.maximum(squares - 2 * phi * products + phi**2 * before, 0.0) / pairs)
    whitened = (
        np.divide(later - phi * earlier, scale, out=np.zeros_like(later), where=scale > 0)
        for earlier, later in _steps(residuals())
    )
    return ResidualModel(phi, scale, shrunk_correlation(whitened, len(scale)))


def _steps(residuals: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(TRs, the ones after them) of each run, (N, V) each, where both are numbers."""
    for run in residuals:
        known = np.isfinite(run).all(axis=1)
        both = known[:-1] & known[1:]
        if both.any():
            yield run[:-1][both], run[1:][both]


def shrunk_correlation(parts: Iterable[np.ndarray], parcels: int) -> np.ndarray:
    """The correlation (V, V) of rows (N, V) of mean 0 and variance 1, shrunk towards none as Ledoit and Wolf do.

    S = X^T X / n becomes (1 - a) S + a m I with m the mean variance and a = min(b, d) / d, where d is the squared
    distance of S from m I, and b that of S from what it estimates, found from how the rows' own products scatter.
    """
    total, fourth, n = np.zeros((parcels, parcels)), 0.0, 0
    for rows in parts:
        total += rows.T @ rows
        fourth += float(np.square(np.square(rows).sum(axis=1)).sum())
        n += len(rows)
    covariance = total / n
    mean = float(np.trace(covariance)) / parcels
    distance = float(np.square(covariance - mean * np.eye(parcels)).sum())
    noise = (fourth / n - float(np.square(covariance).sum())) / n
    amount = max(min(noise, distance) / distance, _LEAST_SHRINKAGE) if distance > 0 else 1.0
    shrunk = (1 - amount) * covariance + amount * (mean or 1.0) * np.eye(parcels)
    size = np.sqrt(np.diagonal(shrunk))
    return shrunk / np.outer(size, size)
