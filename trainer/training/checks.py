"""What is looked at before anything is trained: data that would be learnt from wrongly, and nobody would notice.

An error ends the start before anything is written; a warning names what is done instead, and the key that changes it.
All of it is judged from the manifest's statistics and a few runs of BOLD, on the main process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.manifest import BOLD, Moments
from trainer.data.plan import Span, used_subjects
from trainer.data.statistics import BoldScaling, bold_statistics, median_std
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.run.signals import StopRequest
from trainer.training.crossfit import folds, without
from trainer.training.latent import Series

FAR = 10.0
"""How many times more or less than a z-score BOLD may vary, or lie away from 0, before it is said."""
SUMMED = 1e15
"""Of BOLD that deviates by more, or by less than the inverse, float32 cannot sum squares over a batch."""
SMALLEST_SCALE = 1e-30
"""The smallest standard deviation of features that weights in float32 can be divided by."""
LOUD = 100.0
"""How many times as much as the median parcel a parcel varies before it is said."""
LEAST_VARIANCE = 1e-10
"""The part of the largest principal component's variance below which a component holds rounding alone."""
MOST_Z = 1000.0
"""Root mean square of a column's z-scores in a set beyond which it is said."""
MOST_LISTED = 10


def check(study: Study, stages: Sequence[int]) -> list[str]:
    """Check what `stages`, which begin now, would learn from; returns warnings.

    Raises:
        InputError: a key names a column or parcel that is not there; nobody could predict a subject; nobody chooses the
            step; BOLD has fewer dimensions than stage 2 needs; BOLD or features are in a unit that float32 cannot hold.
    """
    _check_kept(study)
    _check_units(study)
    _check_subjects(study, stages)
    _check_rank(study, stages)
    return [
        *_unknown_subjects(study),
        *_far_units(study),
        *_loud_parcels(study),
        *_other_units(study),
        *_faint_parcels(study),
    ]


def check_parcels(study: Study) -> None:
    """Raise InputError where BOLD has one parcel: stage 2 learns how parcels vary together."""
    if study.manifest.parcels < 2:
        raise InputError(
            study.manifest.folder,
            "stage 2 needs BOLD of at least 2 parcels",
            found=study.manifest.parcels,
            fix="Train stage 1 alone (--stage 1).",
        )


def told_of_features(study: Study, means: Sequence[Tensor], scales: Sequence[Tensor]) -> Iterator[str]:
    """Lines about columns that are left out (scale inf), and about those that reach large z-scores where it is scored.

    Args:
        means, scales: of each stream, (D,), as the anchor takes them.
    """
    out = {s.name: scale.isinf().nonzero()[:, 0].tolist() for s, scale in zip(study.streams, scales, strict=True)}
    if any(out.values()):
        yield (
            "stage1: columns that hardly vary over the training TRs (standard deviation below 1e-4 of the median of "
            f"their stream, or no more than rounding) are left out: {_columns(out, study)}. "
            "stage1.keep_columns=[STREAM:COLUMN] keeps one"
        )
    for name in study.scored_sets(refit=False):
        runs = sorted({span.sample for span in study.spans[name]})
        large = {}
        for stream, mean, scale in zip(study.streams, means, scales, strict=True):
            found = study.manifest.moments(stream.name)
            there = Moments(found.count[runs], found.mean[runs], found.m2[runs]).combine()
            z = np.hypot(there.std(), there.mean - mean.numpy()) / scale.numpy()
            large[stream.name] = np.flatnonzero(z > MOST_Z).tolist()
        if any(large.values()):
            yield (
                f"datasets.{name}: columns reach z-scores beyond {MOST_Z:.0f} there, as they vary far less in "
                f"training, and predictions will follow them alone: {_columns(large, study)}. "
                "Rescale them (a logarithm, say), or leave their stream out of include_features"
            )


def _columns(of_streams: Mapping[str, Sequence[int]], study: Study) -> str:
    """`a/b:3, a/b:4, ... (500 of 4096); c/d:1 (1 of 5)`."""
    widths = {stream.name: stream.width for stream in study.streams}
    return "; ".join(
        f"{_listed([f'{name}:{column}' for column in columns])} ({len(columns)} of {widths[name]})"
        for name, columns in of_streams.items()
        if columns
    )


def bold_rank(series: Iterable[tuple[int, Tensor]], n_parcels: int, enough: int) -> int:
    """The dimensions in which BOLD varies around its subjects' means, at most `enough`; stops as soon as they are seen.

    BOLD is seen through a few more random directions than `enough`: a matrix loses no rank below their number that way,
    and no matrix of (V, V) is needed.

    Args:
        series: (subject, BOLD (T, V)) of one run after the other.
    """
    width = min(n_parcels, enough + 16)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(n_parcels, width, dtype=torch.float64, generator=generator)
    if width == n_parcels:
        directions = torch.eye(n_parcels, dtype=torch.float64)
    scatter, means = torch.zeros(width, width, dtype=torch.float64), dict[int, tuple[int, Tensor]]()
    rank = 0
    for subject, bold in series:
        seen = bold.double()
        old, before = means.get(subject, (0, torch.zeros(n_parcels, dtype=torch.float64)))
        mean = seen.mean(0)
        shift = (mean - before) * (old * len(seen) / (old + len(seen))) ** 0.5
        means[subject] = old + len(seen), before + (mean - before) * (len(seen) / (old + len(seen)))
        part = torch.cat([seen - mean, shift[None]]) @ directions
        scatter += part.T @ part
        rank = _rank(scatter)
        if rank >= enough:
            return enough
    return rank


def _rank(scatter: Tensor) -> int:
    values = torch.linalg.eigvalsh(scatter)
    return int((values > LEAST_VARIANCE * values[-1]).sum()) if values[-1] > 0 else 0


def _check_rank(study: Study, stages: Sequence[int]) -> None:
    """The training BOLD must vary, and for principal components in at least as many dimensions as there are."""
    if not stages:
        return
    config, spans = study.config.stage2, study.spans["train"]
    needs = config.latent_dim if 2 in stages and config.projection == "pca" else 1
    blocks = Series(study, spans, StopRequest()).blocks("rank of the training BOLD")
    rank = bold_rank(((block.subject, block.bold) for block in blocks), study.manifest.parcels, needs)
    n_trs = int(sum(len(span) * sum(span.subjects) for span in spans))
    if rank == 0:
        raise InputError(
            "datasets.train", "the BOLD to learn from does not vary", found=f"{n_trs} TRs of constant BOLD"
        )
    if rank < needs:
        raise InputError(
            "stage2.latent_dim",
            "more dimensions than the training BOLD varies in",
            found=needs,
            expected=f"at most {rank}, with {n_trs} TRs of all subjects less their means",
            fix=f"Set stage2.latent_dim={rank} or less, or train on more runs."
            if not _loud(study).any()
            else "Set bold.standardise=run: some parcels vary so much more than others that nothing else is seen.",
        )


def _check_kept(study: Study) -> None:
    """stage1.keep_columns and bold.keep_parcels name what is there."""
    columns, parcels = study.config.stage1.keep_columns, study.config.bold.keep_parcels
    widths = {stream.name: stream.width for stream in study.streams}
    for entry in columns or ():
        name, column = entry.rsplit(":", 1)
        if name not in widths:
            expected = f"one of {', '.join(widths)}, with :COLUMN"
            raise InputError("stage1.keep_columns", "not a stream of include_features", found=entry, expected=expected)
        if int(column) >= widths[name]:
            expected = f"{name}:0 to {name}:{widths[name] - 1}"
            raise InputError("stage1.keep_columns", "no such column", found=entry, expected=expected)
    for parcel in parcels or ():
        if parcel >= study.manifest.parcels:
            expected = f"0 to {study.manifest.parcels - 1}"
            raise InputError("bold.keep_parcels", "no such parcel", found=parcel, expected=expected)


def _check_units(study: Study) -> None:
    """BOLD that is not z-scored, and features that are, leave room in float32 for their squares and inverses."""
    spans = study.spans["train"]
    if study.config.bold.standardise == "none":
        _, _, std = bold_statistics(study.shards, spans)
        for label, size in zip(study.manifest.subjects, np.median(std, axis=1), strict=True):
            if size > 0 and not 1 / SUMMED <= size <= SUMMED:
                raise InputError(
                    "bold.standardise",
                    f"BOLD of subject {label} is in a unit that float32 cannot sum squares in",
                    found=f"standard deviation {size:.3g} in the median parcel",
                    expected=f"{1 / SUMMED:g} to {SUMMED:g}",
                    fix="Set bold.standardise=run or bold.standardise=subject.",
                )
    runs = sorted({span.sample for span in spans})
    for stream in study.streams if study.config.stage1.standardise_features else ():
        found = study.manifest.moments(stream.name)
        there = Moments(found.count[runs], found.mean[runs], found.m2[runs]).combine()
        size = float(np.max(there.std()))
        if 0 < size < SMALLEST_SCALE:
            raise InputError(
                f"include_features: {stream.name}",
                "features in a unit that float32 cannot divide by",
                found=f"a standard deviation of at most {size:.3g}",
                expected=f"{SMALLEST_SCALE:g} or more",
                fix="Write the features in another unit and build the shards anew, or leave the stream out.",
            )


def _check_subjects(study: Study, stages: Sequence[int]) -> None:
    """Every subject that is scored, or predicted by an anchor of another fold, can be predicted, and some choose."""
    config, manifest = study.config, study.manifest
    spans = study.anchor_spans(refit=False)
    taught = {1: study.labels_of(spans), 2: study.labels_of(study.spans["train"])}
    for number in stages:
        val = config.val_set_name
        if len(study.untrained(val, taught[number])) == len(study.labels_of(study.spans[val])):
            raise InputError(
                f"datasets.{val}",
                "none of its subjects is in the training set, so that none can choose the step",
                found=_listed(study.labels_of(study.spans[val])),
                expected=f"some of {_listed(taught[number])}",
            )
        for name in study.scored_sets(refit=False):
            unknown = study.untrained(name, taught[number])
            if unknown and not _predicts_unknown(study, number):
                key = "stage1.model.with_shared_decoder" if number == 1 else "stage2.parametrisation"
                raise InputError(
                    f"datasets.{name}",
                    f"{_names(unknown)} not in the training set, and nothing that subjects share could predict them",
                    fix=f"Leave them out with datasets.{name}.filter.subjects, or change {key}.",
                )
    if 2 not in stages or config.stage1.model.with_shared_decoder:
        return
    k = config.stage2.cross_fit
    for hidden in folds(spans, manifest, k) if k else ():
        known = study.labels_of(without(spans, hidden) or [Span(0, 0, 0, (False,) * len(manifest.subjects))])
        unknown = [label for label in study.labels_of(hidden) if label not in known] if hidden else []
        if unknown:
            raise InputError(
                "stage2.cross_fit",
                f"{_names(unknown)} in one fold only, of which the anchors of the others predict nothing",
                found=f"{k} folds",
                fix="Set stage1.model.with_shared_decoder=true or stage2.cross_fit=0, or leave them out.",
            )


def _predicts_unknown(study: Study, number: int) -> bool:
    """Whether a stage has something to predict a subject by that it has not learnt from."""
    stage1, stage2 = study.config.stage1.model, study.config.stage2
    if number == 1:
        return stage1.with_shared_decoder
    return stage2.subjects == "embedding" or stage2.parametrisation == "skip"


def _unknown_subjects(study: Study) -> Iterator[str]:
    """A line for each scored set with subjects that are not trained."""
    trained = study.labels_of(study.spans["train"])
    for name in study.scored_sets(refit=False):
        unknown = study.untrained(name, trained)
        if unknown:
            yield (
                f"datasets.{name}: {_names(unknown)} not in the training set (datasets.train.filter): predicted by "
                "what subjects share, the shared decoder and the mean of the trained embeddings, without a say in the "
                "choice of the step"
            )


def _far_units(study: Study) -> Iterator[str]:
    """A line where BOLD that is not z-scored is far from z-scores."""
    if study.config.bold.standardise != "none":
        return
    _, mean, std = bold_statistics(study.shards, study.spans["train"])
    used = used_subjects(study.spans["train"])
    level, size = (np.median(values, axis=1) for values in (np.abs(mean), std))
    far = [
        (label, level[s], size[s])
        for s, label in enumerate(study.manifest.subjects)
        if used[s] and size[s] > 0 and not (1 / FAR <= size[s] <= FAR and level[s] <= FAR * max(size[s], 1.0))
    ]
    if far:
        label, mean_of_median, std_of_median = far[0]
        yield (
            f"bold.standardise: BOLD of {_names([label for label, _, _ in far])} far from z-scores, for which "
            f"learning rates are made (subject {label}: |mean| {mean_of_median:.3g}, std {std_of_median:.3g} in the "
            "median parcel), so that predictions stay too small or too large for stage 2: set bold.standardise=run or "
            "bold.standardise=subject"
        )


def _loud(study: Study) -> np.ndarray:
    """(S, V) bool: the parcels that vary more than `LOUD` times as much in training as the subject's median parcel."""
    if study.config.bold.standardise != "none":
        return np.zeros((1, 1), bool)
    _, mean, std = bold_statistics(study.shards, study.spans["train"])
    return std > LOUD * np.where((median := median_std(mean, std)) > 0, median, np.inf)


def _loud_parcels(study: Study) -> Iterator[str]:
    """A line where BOLD that is not z-scored has parcels beside which the others count for nothing."""
    loud = _loud(study)
    if loud.any():
        parcels = {
            label: np.flatnonzero(row).tolist() for label, row in zip(study.manifest.subjects, loud, strict=True)
        }
        yield (
            f"bold.standardise: parcels vary more than {LOUD:.0f} times as much as the median parcel, so that the loss "
            f"is theirs alone: {_parcels(parcels, study)}. Set bold.standardise=run or bold.standardise=subject"
        )


def _other_units(study: Study) -> Iterator[str]:
    """A line for each scored set in which a subject's BOLD has another unit than in training; `run` evens that out."""
    if study.config.bold.standardise == "run":
        return
    _, trained_mean, trained_std = bold_statistics(study.shards, study.spans["train"])
    for name in study.scored_sets(refit=False):
        _, mean, std = bold_statistics(study.shards, study.spans[name])
        there = median_std(mean, std)[:, 0]
        before = median_std(trained_mean, trained_std)[:, 0]
        shift = np.median(np.abs(mean - trained_mean), axis=1)
        other = [
            s
            for s in np.flatnonzero((there > 0) & (before > 0))
            if not (1 / FAR <= there[s] / before[s] <= FAR and shift[s] <= FAR * before[s])
        ]
        if other:
            labels = [study.manifest.subjects[s] for s in other]
            level, trained = (np.median(np.abs(values[other[0]])) for values in (mean, trained_mean))
            yield (
                f"datasets.{name}: BOLD of {_names(labels)} in another unit than in training (subject {labels[0]}: "
                f"|mean| {level:.3g}, std {there[other[0]]:.3g} in the median parcel, there |mean| {trained:.3g}, "
                f"std {before[other[0]]:.3g}), so that all scores but r are wrong: set bold.standardise=run"
            )


def _faint_parcels(study: Study) -> Iterator[str]:
    """A line where parcels are not divided by their own standard deviation."""
    scaling: BoldScaling = study.scaling
    if scaling.faint is None:
        return
    there = study.manifest.moments(BOLD).count > 0  # (R, S)
    runs = np.broadcast_to(scaling.faint, (*there.shape, study.manifest.parcels))
    faint: np.ndarray = np.any(runs & there[..., None], axis=0)
    parcels = {
        label: np.flatnonzero(row).tolist()
        for label, row in zip(study.manifest.subjects, faint, strict=True)
        if row.any()
    }
    if parcels:
        yield (
            f"bold.standardise={scaling.mode}: parcels that hardly vary over "
            f"{'a run' if scaling.mode == 'run' else 'the training TRs'} (standard deviation below 1e-4 of the median "
            f"parcel's, or no more than rounding) are divided by the median parcel's: {_parcels(parcels, study)}. "
            "bold.keep_parcels=[PARCEL] lets one keep its own"
        )


def _parcels(of_subjects: Mapping[str, Sequence[int]], study: Study) -> str:
    """`subject 1: 3, 4, ... (50 of 1000); subject 2: 1 (1 of 1000)`."""
    return "; ".join(
        f"subject {label}: {_listed(list(map(str, numbers)))} ({len(numbers)} of {study.manifest.parcels})"
        for label, numbers in of_subjects.items()
        if numbers
    )


def _listed(names: Sequence[str]) -> str:
    """The names, shortened."""
    return ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")


def _names(labels: Sequence[str]) -> str:
    """`subject 2 is`, or `subjects 2, 3 are`."""
    return f"subject {labels[0]} is" if len(labels) == 1 else f"subjects {_listed(labels)} are"
