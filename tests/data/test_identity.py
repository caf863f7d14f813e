"""What counts as the same data: order, tars and additions do not matter, contents do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from trainer.config import Filter
from trainer.data.identity import (
    DataRecord,
    Known,
    check,
    differ,
    differences,
    is_certain,
    listed,
    record_of,
    set_digest,
)
from trainer.data.manifest import BOLD, Manifest, Sample
from trainer.data.overlap import shared
from trainer.data.plan import Span, select
from trainer.data.shards import Shards
from trainer.errors import InputError
from trainer.scoring.records import on_other_data


@pytest.fixture(scope="module")
def manifest(invented_shards: Shards) -> Manifest:
    return invented_shards.manifest


def record(manifest: Manifest, **sets: Filter) -> DataRecord:
    """Of sets that take some runs, and the streams but the first."""
    return record_of(
        manifest, manifest.streams[1:], {n: (chosen, select(manifest, chosen)) for n, chosen in sets.items()}
    )


def edited(manifest: Manifest, samples: Sequence[Sample], **more: object) -> Manifest:
    """Other shards, whose manifest has another digest."""
    return replace(manifest, samples=tuple(samples), digest="other", **more)


def spoilt(sample: Sample, name: str, row: int = 0) -> Sample:
    """The sample with another content of one array."""
    place = sample.arrays[name]
    hashes = [("f" * 32 if i == row else word) for i, word in enumerate(place.hashes)]
    return replace(sample, arrays={**sample.arrays, name: replace(place, hashes=tuple(hashes))})


def described(manifest: Manifest, spans: Sequence[Span]) -> list[tuple[str, int, int, list[str]]]:
    """Spans by name."""
    return [
        (manifest.samples[s.sample].key, s.start, s.stop,
         sorted(label for label, used in zip(manifest.subjects, s.subjects, strict=True) if used))
        for s in spans
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.permutations(["a", "b", "3", "new"]), st.permutations(range(3)))
def test_order_and_additions_do_not_matter(
    manifest: Manifest, samples: list[int], axis: list[str], streams: list[int]
) -> None:
    chosen = Filter(runs=["alpha*"], trs=[2, -3], subjects=["a", "3"])
    before = record(manifest, train=chosen, val=Filter(runs=["beta_1"], repeats=[2]))
    ordered = [manifest.streams[i] for i in streams]
    now = edited(manifest, [manifest.samples[i] for i in samples], streams=tuple(ordered), subjects=tuple(axis))
    now = now.with_subjects(before.subjects)
    assert list(differences(before, now)) == [] and is_certain(before, now)
    found = before.spans("train", chosen, now)
    assert found is not None
    assert described(now, found) == described(manifest, select(manifest, chosen))
    assert before.spans("train", Filter(runs=["alpha*"]), now) is None, "another filter"
    assert before.spans("test", chosen, now) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.sampled_from([BOLD, "text.v2/emb", "video/deep", "audio/mono"]), st.integers(0, 1))
def test_a_change_is_a_difference_exactly_where_it_was_used(
    manifest: Manifest, number: int, name: str, row: int
) -> None:
    before = record(manifest, train=Filter(runs=["alpha*"], subjects=["b", "3"]), val=Filter(repeats=[2]))
    sample = manifest.samples[number]
    samples = [
        *manifest.samples[:number],
        spoilt(sample, name, row if name == BOLD else 0),
        *manifest.samples[number + 1 :],
    ]
    found = list(differences(before, edited(manifest, samples)))
    in_train, in_val = sample.run.startswith("alpha"), sample.repeat == 2
    used = in_val or (in_train and row == 1) if name == BOLD else (in_train or in_val) and name != "text.v2/emb"
    assert len(found) == used
    if used:
        assert sample.run in found[0] and (f"subject {sample.subjects[row]}" if name == BOLD else name) in found[0]


def test_a_record_survives_json(manifest: Manifest) -> None:
    before = record(manifest, train=Filter(trs=[None, -3]), val=Filter(films=["beta"]))
    assert DataRecord.from_json(json.loads(json.dumps(before.as_json()))) == before


def test_the_very_same_shards_are_the_same_with_hashes_or_without(manifest: Manifest) -> None:
    plain = [replace(s, arrays={n: replace(p, hashes=()) for n, p in s.arrays.items()}) for s in manifest.samples]
    old = replace(manifest, samples=tuple(plain), digest=next(iter(manifest.digests - {manifest.digest})))
    before = record(old, train=Filter(), val=Filter())
    assert is_certain(before, manifest) and not list(differences(before, manifest))
    now = edited(manifest, manifest.samples, name="renamed")
    assert not is_certain(before, now) and not list(differences(before, now))
    with pytest.raises(InputError, match="as contents have no hashes"):
        check(Known(manifest.folder, before), now, "shards", trains=True)
    assert "nothing says" in (check(Known(manifest.folder, before), now, "shards", trains=False) or "")


def test_of_many_differences_the_first_few_are_named() -> None:
    assert listed(["a", "b"]) == "a; b"
    assert listed(list("abcde")) == "a; b; c; and 2 more"


def test_the_digest_of_a_set_tells_bold_from_features(manifest: Manifest) -> None:
    spans = select(manifest, Filter(runs=["alpha_1"], subjects=["a", "3"]))
    streams = manifest.streams[:2]
    before = set_digest(manifest, spans, streams)

    def after(sample: Sample) -> dict[str, str]:
        return set_digest(edited(manifest, [sample, *manifest.samples[1:]]), spans, streams)

    first = manifest.samples[0]
    assert differ(before, after(spoilt(first, BOLD, 2))) == ["bold"]
    assert differ(before, after(spoilt(first, "video/deep"))) == ["features"]
    assert after(spoilt(first, BOLD, 1)) == before, "b is not in the set"
    assert after(spoilt(first, "audio/mono")) == before
    assert on_other_data({"data": before}, after(spoilt(first, BOLD, 2))) and not on_other_data(
        {"data": before}, before
    )
    assert not on_other_data({}, before) and not on_other_data({"data": before}, None)


def test_without_hashes_the_tars_stand_for_the_contents_of_one_folder_alone(manifest: Manifest) -> None:
    plain = [replace(s, arrays={n: replace(p, hashes=()) for n, p in s.arrays.items()}) for s in manifest.samples]
    spans = select(manifest, Filter())
    old = set_digest(edited(manifest, plain), spans, manifest.streams)
    tars = tuple(replace(tar, sha256="0" * 64) for tar in manifest.shards)
    other = set_digest(edited(manifest, plain, shards=tars), spans, manifest.streams)
    known = set_digest(manifest, spans, manifest.streams)
    assert all(word.startswith("tar:") for word in old.values())
    assert on_other_data({"data": old}, other), "scored again, to be safe"
    assert differ(old, other) == [] and differ(old, known) == [] and not on_other_data({"data": old}, known)


def test_showings_and_equal_features_are_one_stimulus(manifest: Manifest) -> None:
    def spans(**chosen: object) -> list[Span]:
        return select(manifest, Filter(**chosen))  # type: ignore[arg-type]

    first, second = (spans(runs=["beta_1"], repeats=[repeat]) for repeat in (1, 2))
    keys = [manifest.samples[span.sample].key for span in (*first, *second)]
    assert shared(manifest, first, second) == [tuple(keys)]
    assert shared(manifest, spans(runs=["alpha*"]), second) == []
    early, late = spans(runs=["beta_1"], trs=[None, 10]), spans(runs=["beta_1"], trs=[10, None])
    assert shared(manifest, early, late) == [], "other TRs of one stimulus: a set may be cut off another"
    assert len(shared(manifest, early, spans(runs=["beta_1"], trs=[9, None]))) == 4
    one, two = manifest.samples[0], manifest.samples[2]
    same = {n: replace(two.arrays[n], hashes=one.arrays[n].hashes) for n in two.arrays}
    renamed = edited(manifest, [one, manifest.samples[1], replace(two, arrays=same), manifest.samples[3]])
    assert shared(renamed, spans(runs=["alpha_1"]), first) == [(one.key, two.key)]
    half = {**same, "audio/mono": two.arrays["audio/mono"]}
    partly = edited(manifest, [one, manifest.samples[1], replace(two, arrays=half), manifest.samples[3]])
    assert shared(partly, spans(runs=["alpha_1"]), first) == [], "one stream differs"
