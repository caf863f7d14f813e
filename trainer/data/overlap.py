"""Does a set that judges a training hold what the training has seen? Stimuli are compared, not only samples.

Two showings of one run are the same stimulus, and so are runs of other names whose features are all equal, over the
TRs that both have where one scan was a TR or two longer. A model that has learnt one of them is judged by the other on
what it knows. Some do this on purpose, so it is a warning, and names what it is about. TRs of one and the same sample
in training and validation are refused before (`Study.check_apart`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trainer.data.identity import LISTED, features_digest
from trainer.data.manifest import Manifest, Sample
from trainer.data.plan import Span
from trainer.data.runs import MAX_TRS_APART
from trainer.data.shards import Shards
from trainer.data.study import Study

_LOOK = 4
"""TRs at the end that are compared before whole runs are."""


def shared_stimuli(study: Study) -> list[str]:
    """A sentence for each two sets that hold the same TRs of a stimulus.

    The training set is compared with all others, and the validation set with those that are only scored. TRs that
    validation and a scored set share by name are no news to who has named them, so there other samples count only.
    """
    names = ["train", study.config.val_set_name]
    others = [name for name in study.spans if name not in names]
    pairs = [("train", names[1]), *((name, other) for name in names for other in others)]
    sentences = []
    for name, other in pairs:
        runs = shared(study.manifest, study.spans[name], study.spans[other])
        runs += cut_otherwise(study.shards, study.spans[name], study.spans[other])
        runs = [(one, two) for one, two in runs if one != two or name == "train"]
        if runs:
            sentences.append(_sentence(name, other, runs))
    return sentences


def _sentence(name: str, other: str, runs: Sequence[tuple[str, str]]) -> str:
    listed = ", ".join(one if one == two else f"{one} and {two}" for one, two in runs[:LISTED])
    more = f", and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
    return f"datasets.{name} and datasets.{other} hold the same TRs of one stimulus: {listed}{more}"


def shared(manifest: Manifest, spans: Sequence[Span], others: Sequence[Span]) -> list[tuple[str, str]]:
    """Keys of runs of which the first set and the second hold the same TRs of one stimulus."""
    by_name: Mapping[object, list[Span]] = defaultdict(list)
    for span in others:
        for stimulus in _stimuli(manifest, manifest.samples[span.sample]):
            by_name[stimulus].append(span)
    found = dict.fromkeys(
        (manifest.samples[span.sample].key, manifest.samples[other.sample].key)
        for span in spans
        for stimulus in _stimuli(manifest, manifest.samples[span.sample])
        for other in by_name.get(stimulus, ())
        if span.start < other.stop and other.start < span.stop
    )
    return list(found)


def cut_otherwise(shards: Shards, spans: Sequence[Span], others: Sequence[Span]) -> list[tuple[str, str]]:
    """As `shared`, of runs whose lengths differ by at most MAX_TRS_APART, so that hashes say nothing.

    Their features are read, of most pairs a few TRs of one stream.
    """
    samples = shards.manifest.samples
    found = dict.fromkeys(
        (samples[span.sample].key, samples[other.sample].key)
        for span in spans
        for other in others
        if 0 < abs(samples[span.sample].n_trs - samples[other.sample].n_trs) <= MAX_TRS_APART
        and (samples[span.sample].series, samples[span.sample].run)
        != (samples[other.sample].series, samples[other.sample].run)
        and span.start < other.stop
        and other.start < span.stop
        and _starts_alike(shards, span.sample, other.sample)
    )
    return list(found)


def _starts_alike(shards: Shards, one: int, other: int) -> bool:
    """Whether all streams of two samples are equal over the TRs that both have."""
    n_trs = min(shards.manifest.samples[sample].n_trs for sample in (one, other))
    return all(
        np.array_equal(shards.read(one, stream.name, start, n_trs), shards.read(other, stream.name, start, n_trs))
        for start in (max(n_trs - _LOOK, 0), 0)
        for stream in shards.manifest.streams
    )


def _stimuli(manifest: Manifest, sample: Sample) -> Iterator[object]:
    """What names the stimulus of a sample: series and run, whatever the showing, and the content of all its streams."""
    yield sample.series, sample.run
    digest = features_digest(sample, manifest.streams)
    if digest:
        yield digest
