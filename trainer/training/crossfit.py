"""Anchors that predict TRs they have not seen, for stage 2 to learn from.

An anchor fits its own training TRs far better than new ones, so a flow that is trained around those predictions trusts
the anchor too much, and takes its residuals for smaller than they are. Cross-fitting cures it: K anchors, each trained
on all folds but one, each predicting the fold it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trainer.data.batches import whole_runs
from trainer.data.manifest import Manifest
from trainer.data.plan import Span
from trainer.data.predictions import MADE_FROM, StoredPredictions
from trainer.data.study import Study
from trainer.models.anchor import Anchor
from trainer.run.files import write_json
from trainer.scoring.records import write_array
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


class Predictions(StoredPredictions):
    """What anchors predict for samples: sample index -> (S, T, V) float32, memory-mapped; NaN where none was asked.

    The files lie in a folder of the run, one .npy a sample, so that stage 2 reads its anchor like any other array and
    never computes it twice.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        super().__init__(folder, study.manifest, study.streams)
        self.study = study

    @torch.no_grad()
    def write(self, parts: Sequence[tuple[Anchor, Sequence[Span]]], processes: Ranks) -> None:
        """Let each anchor predict its spans, seeing the features of the whole run; files that are there are kept.

        The ranks share the samples. The anchors' weights must be the same on all of them.

        Raises:
            InputError, OSError: on every rank, where one cannot read a shard, or write a file; or a file that is there
                was predicted from other features.
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
        """The samples whose predictions are still to be written, into a folder that is there from now on.

        It says from then on what each of them is predicted from.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = sorted({span.sample for _, spans in parts for span in spans})
        missing = [sample for sample in wanted if not self.path(sample).exists()]
        for sample in set(wanted).difference(missing):
            self.check_features(sample)
        now = {self.study.manifest.samples[sample].key: self.features(sample) for sample in missing}
        self.made_from |= {key: features for key, features in now.items() if features}
        write_json(self.folder / MADE_FROM, self.made_from)
        return missing

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
        write_array(self.path(sample), whole)
