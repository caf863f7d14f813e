"""Do the numbers that a report shows side by side speak of the same data? A sentence for each that do not.

A set that is only scored may come to hold other data; then scores of before and after stand in one run. Two runs may
have been scored on other BOLD of the same name. Such scores are shown, but no difference between them is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from trainer.data.identity import Known, differ, differences, listed
from trainer.data.manifest import BOLD, Manifest
from trainer.run.directory import StageDirectory
from trainer.scoring.records import on_other_data


def notes_on_shards(known: Sequence[Known], manifest: Manifest, shards: str) -> list[str]:
    """What the shards hold otherwise by now than the stages were trained and validated on."""
    found = ((each, list(differences(each.record, manifest))) for each in known)
    return [
        f"{shards}: not the data that {each.where} was trained and validated on: {listed(differing)}."
        for each, differing in found
        if differing
    ]


def notes_on_scores(directory: StageDirectory, scores: Sequence[Mapping[str, Any]], step: int | None) -> list[str]:
    """Sets that held other data when other steps of a stage were scored than the step that is shown."""
    notes = []
    for shown in scores:
        if shown["step"] == step and shown["estimate"] == "mean" and isinstance(shown.get("data"), dict):
            others = {score["step"] for score in scores if score["set"] == shown["set"] and _other(score, shown)}
            if others:
                steps = ", ".join(map(str, sorted(others)))
                notes.append(f"{directory.scores}: {shown['set']} held other data when step {steps} was scored.")
    return notes


def _other(score: Mapping[str, Any], shown: Mapping[str, Any]) -> bool:
    return isinstance(score.get("data"), dict) and on_other_data(score, shown["data"])


def same_bold(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two scores judge predictions of the same BOLD, as far as they say."""
    return BOLD not in differ(one.get("data") or {}, other.get("data") or {})


def notes_between(set_name: str, scores: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What keeps scores on one set, by the name of what was scored, from being compared."""
    for (before, one), (after, other) in pairwise(scores.items()):
        if not same_bold(one, other):
            yield f"{set_name}: {before} and {after} were scored on different BOLD, so they cannot be compared."
