"""Does a set that judges a training hold what the training has seen? Stimuli are compared, not only samples.

Two showings of one run are the same stimulus, and so are runs of other names whose features are all equal. A model that
has learnt one of them is judged by the other on what it knows. Some do this on purpose, so it is a warning, and names
what it is about. TRs of one and the same sample in training and validation are refused before (`Study.check_apart`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from trainer.data.identity import LISTED, features_digest
from trainer.data.manifest import Manifest, Sample
from trainer.data.plan import Span
from trainer.data.study import Study


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


def _stimuli(manifest: Manifest, sample: Sample) -> Iterator[object]:
    """What names the stimulus of a sample: series and run, whatever the showing, and the content of all its streams."""
    yield sample.series, sample.run
    digest = features_digest(sample, manifest.streams)
    if digest:
        yield digest
