"""Anchors that predict TRs they have not seen, for stage 2 to learn from.

An anchor fits its own training TRs far better than new ones, so a flow that is trained around those predictions trusts
the anchor too much, and takes its residuals for smaller than they are. Cross-fitting cures it: K anchors, each trained
on all folds but one, each predicting the fold it has not seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import Batch, whole_runs
from trainer.data.manifest import Manifest
from trainer.data.plan import Span
from trainer.data.study import Study
from trainer.models.anchor import Anchor
from trainer.models.flow import CovarianceAccumulator, FlowMatching, Latent
from trainer.scoring.shares import Ranks, in_order, shown


def folds(spans: Sequence[Span], manifest: Manifest, k: int) -> list[list[Span]]:
    """Deal the TRs of `spans` into k folds of about equal length.

    Where there are at least k stimuli, whole runs are dealt, longest first to the shortest fold, and the showings of
    one stimulus stay together; else each span is cut into k blocks of TRs.
    """
    stimuli: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        sample = manifest.samples[span.sample]
        stimuli.setdefault((sample.series, sample.run), []).append(span)
    if len(stimuli) < k:
        return [[piece for span in spans for piece in _block(span, fold, k)] for fold in range(k)]
    dealt: list[list[Span]] = [[] for _ in range(k)]
    lengths = [0] * k
    for group in sorted(stimuli.values(), key=_length, reverse=True):
        shortest = lengths.index(min(lengths))
        dealt[shortest] += group
        lengths[shortest] += _length(group)
    return dealt


def without(spans: Sequence[Span], held_out: Sequence[Span]) -> list[Span]:
    """What remains of `spans` when the TRs of `held_out` are taken away."""
    remaining = []
    for span in spans:
        pieces = [span]
        for hole in (h for h in held_out if h.sample == span.sample):
            pieces = [part for piece in pieces for part in _cut(piece, hole)]
        remaining += pieces
    return remaining


def _length(spans: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def _block(span: Span, fold: int, k: int) -> list[Span]:
    edges = np.linspace(span.start, span.stop, k + 1).round().astype(int)
    start, stop = int(edges[fold]), int(edges[fold + 1])
    return [replace(span, start=start, stop=stop)] if stop > start else []


def _cut(span: Span, hole: Span) -> list[Span]:
    before = replace(span, stop=min(span.stop, hole.start))
    after = replace(span, start=max(span.start, hole.stop))
    return [piece for piece in (before, after) if piece.stop > piece.start]


class Predictions(Mapping[int, np.ndarray]):
    """What anchors predict for samples: sample index -> (S, T, V) float32, memory-mapped; NaN where none was asked.

    The files lie in a folder of the run, one .npy a sample, so that stage 2 reads its anchor like any other array and
    never computes it twice.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder, self.study = folder, study

    def path(self, sample: int) -> Path:
        """Where the predictions of a sample lie."""
        return self.folder / f"{self.study.manifest.file_stems[sample]}.npy"

    def __getitem__(self, sample: int) -> np.ndarray:
        return np.load(self.path(sample), mmap_mode="r")

    def __iter__(self) -> Iterator[int]:
        return (sample for sample in range(len(self.study.manifest.samples)) if self.path(sample).exists())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @torch.no_grad()
    def write(self, parts: Sequence[tuple[Anchor, Sequence[Span]]], processes: Ranks) -> None:
        """Let each anchor predict its spans, seeing the features of the whole run; files that are there are kept.

        The ranks share the samples. The anchors' weights must be the same on all of them.

        Raises:
            InputError, OSError: on every rank, where one cannot read a shard, or write a file.
        """
        # one look at the disk for all: a rank that looked later would see the files of a faster one, and deal otherwise
        missing = processes.first(lambda: self._missing(parts))

        def write_share() -> Sequence[int]:
            mine = processes.share(missing)
            for sample in shown(processes, mine, "predicting unseen runs", len(missing)):
                self._write_sample(sample, parts, processes.device)
            return mine

        in_order(processes, write_share)  # none goes on before all the files are there

    def _missing(self, parts: Sequence[tuple[Anchor, Sequence[Span]]]) -> list[int]:
        """The samples whose predictions are still to be written, into a folder that is there from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = sorted({span.sample for _, spans in parts for span in spans})
        return [sample for sample in wanted if not self.path(sample).exists()]

    def _write_sample(self, sample: int, parts: Sequence[tuple[Anchor, Sequence[Span]]], device: torch.device) -> None:
        manifest = self.study.manifest
        n_trs = manifest.samples[sample].n_trs
        whole = np.full((len(manifest.subjects), n_trs, manifest.parcels), np.nan, dtype=np.float32)
        for anchor, spans in parts:
            here = [span for span in spans if span.sample == sample]
            for span in here[:1]:
                run = replace(span, start=0, stop=n_trs)
                batch = next(iter(whole_runs(self.study.shards, [run], self.study.streams, self.study.scaling)))
                batch = batch.to(device)
                predicted = anchor.eval()(batch.features, batch.mask)[0].float().cpu().numpy()
            for span in here:
                whole[:, span.start : span.stop] = predicted[:, span.start : span.stop]
        aside = self.path(sample).with_suffix(f".{os.getpid()}")
        with aside.open("wb") as file:
            np.save(file, whole)
        aside.replace(self.path(sample))


@torch.no_grad()
def fit_latent(
    flow: FlowMatching, study: Study, spans: Sequence[Span], predictions: Predictions | None, processes: Ranks
) -> None:
    """Fit the latent to the BOLD of `spans`, and what a sample adds outside it to what the anchors left there.

    A sample adds white noise e that is then projected on the complement Q = I - P^T P, where parcel v keeps a share
    Q_vv of its variance: so the variance of e is that of Q (x - mu), over Q_vv. Without predictions e stays 0. A
    trainable projection has nothing to fit.

    The main process fits and hands the latent to all, so that it is the same to the bit on all ranks, however many
    there are. They wait for it: 15 s for 144,000 (subject, TR) pairs of 1000 parcels and 128 dimensions on one core of
    a Cascade Lake.

    Raises:
        InputError: on every rank, where BOLD does not vary, or a shard cannot be read.
    """
    latent = flow.latent
    if isinstance(latent, Latent):
        latent.load_state_dict(processes.first(lambda: _fitted(flow, latent, study, spans, predictions)))


def _fitted(
    flow: FlowMatching, latent: Latent, study: Study, spans: Sequence[Span], predictions: Predictions | None
) -> dict[str, Tensor]:
    """Fit the latent of `flow` here; its buffers, on the CPU."""
    covariance = CovarianceAccumulator(*latent.mean.shape)
    for subject, bold, _ in _bold_series(study, spans):
        covariance.update(bold, subject)
    flow.fit_latent(covariance)
    if predictions is not None:
        latent.residual_std.copy_(_residual_std(latent.basis.double().cpu(), study, spans, predictions))
    return {name: buffer.cpu() for name, buffer in latent.state_dict().items()}


def _residual_std(basis: Tensor, study: Study, spans: Sequence[Span], predictions: Predictions) -> Tensor:
    """(S, V) standard deviation of e, outside the subspace of `basis` (d, V) float64."""
    subjects, parcels = len(study.manifest.subjects), study.manifest.parcels
    squares, count = torch.zeros(subjects, parcels, dtype=torch.float64), torch.zeros(subjects, 1, dtype=torch.float64)
    for subject, bold, mu in _bold_series(study, spans, predictions):
        assert mu is not None
        left = (bold - mu).double()
        outside = left - (left @ basis.T) @ basis
        squares[subject] += outside.square().sum(0)
        count[subject] += len(outside)
    share = 1.0 - basis.square().sum(0)
    variance = squares / count.clamp(min=1) / share.clamp(min=1e-6)
    return torch.where(share > 1e-6, variance, 0.0).sqrt()


@torch.no_grad()
def latent_range(flow: FlowMatching, study: Study, spans: Sequence[Span], processes: Ranks) -> tuple[float, float]:
    """Least and largest standard deviation, over dimensions, of the latents of the BOLD of `spans`, on every rank.

    Taken around each run's and subject's own mean, and pooled: 1 for a fresh principal component. The ranks share the
    runs.
    """

    def square_share() -> list[tuple[Tensor, int]]:
        batches = whole_runs(study.shards, spans, [], study.scaling, rank=processes.rank, world=processes.world)
        return [_latent_squares(flow, batch.to(processes.device)) for batch in batches]

    runs = in_order(processes, square_share)
    squares = torch.stack([squares for squares, _ in runs]).sum(0)
    std = (squares / sum(count for _, count in runs)).sqrt()
    return float(std.min()), float(std.max())


def _latent_squares(flow: FlowMatching, batch: Batch) -> tuple[Tensor, int]:
    """The latents of one run: sum of their squares around each subject's mean, (d,) float64, and their number."""
    subject = batch.subject_mask[0].nonzero()[:, 0]
    z = flow.latent.encode(batch.bold[0, subject], subject).double().cpu()
    return (z - z.mean(1, keepdim=True)).square().sum((0, 1)), z.shape[0] * z.shape[1]


def _bold_series(
    study: Study, spans: Sequence[Span], predictions: Predictions | None = None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(subject, BOLD (T, V), predictions (T, V) or None) of every span and subject that has BOLD."""
    for batch in whole_runs(study.shards, spans, [], study.scaling, anchor=predictions):
        for subject in batch.subject_mask[0].nonzero()[:, 0].tolist():
            mu = None if batch.anchor is None else batch.anchor[0, subject]
            yield subject, batch.bold[0, subject], mu
