"""The scans of one series as they lie on disk, and what is to become of those with something wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.hdf5 import dataset_names, describe, is_same
from trainer.data.layout import BoldPattern, Layout, RunGroups, find_files, pattern_regex
from trainer.data.manifest import Skipped
from trainer.data.runs import Source
from trainer.errors import InputError


@dataclass
class Mistakes:
    """What is wrong with files, runs and scans. Where nothing is to be skipped the first mistake is raised."""

    skip: bool
    skipped: list[Skipped] = field(default_factory=list)

    def note(self, error: InputError, run: str, subject: str = "") -> None:
        """Note why a run (or a series), or a subject's scan of it, is left out, or raise the error."""
        if not self.skip:
            raise error
        self.skipped.append(Skipped(run, str(error), subject))


@dataclass
class Scan:
    """One showing of one run, while it is looked for.

    Attributes:
        repeated: whether the name says which showing it is.
        bold: the scans that can be read, by subject.
        bad: what is wrong with the others.
        wanted: of a run without BOLD, how many TRs of each subject are to be predicted.
    """

    groups: RunGroups
    repeated: bool
    bold: dict[str, Source] = field(default_factory=dict)
    bad: dict[str, InputError] = field(default_factory=dict)
    wanted: Mapping[str, int] = field(default_factory=dict)


def find_scans(
    layout: Layout,
    root: Path,
    series: str,
    pattern: BoldPattern,
    label: str,
    scans: dict[tuple[str, int], Scan],
    notes: list[str],
    mistakes: Mistakes,
) -> None:
    """Add one subject's data sets of one series to `scans`."""
    described = layout.series[series]
    found_file = False
    for path, fields in find_files(root, pattern.file, {"subject": layout.subjects[label]}):
        found_file = True
        try:
            names = dataset_names(path)
            matches = {name: pattern_regex(pattern.dataset, fields).fullmatch(name) for name in names}
            values = {name: _values(fields, match) for name, match in matches.items() if match}
            groups = {name: described.groups(values[name].get("run", "")) for name in values}
            if not any(groups.values()):
                raise InputError(
                    path,
                    "no data set of this series",
                    found=", ".join(names[:3]) or "an empty file",
                    expected=f"{pattern.dataset} with run {' or '.join(described.runs)}",
                )
        except InputError as error:
            mistakes.note(error, series, label)
            continue
        for name, group in groups.items():
            if group is not None:
                place = (values[name]["run"], int(values[name].get("repeat", 1)))
                scan = scans.setdefault(place, Scan(group, "repeat" in values[name]))
                _add_scan(scan, path, name, label, f"run {place[0]}, repeat {place[1]}", mistakes)
        ignored = [name for name in names if not groups.get(name)]
        if ignored:
            notes.append(f"{path}: {len(ignored)} data set(s) are not of {series}: {', '.join(ignored[:3])}")
    if not found_file:
        notes.append(f"{series}: no BOLD file of subject {label}")


def _values(fields: Mapping[str, str], match: re.Match[str]) -> dict[str, str]:
    return {**fields, **{k: v for k, v in match.groupdict().items() if v is not None}}


def _add_scan(scan: Scan, path: Path, name: str, label: str, which: str, mistakes: Mistakes) -> None:
    """Add one data set to a scan. Raises InputError where the subject has another one already, or it is bad."""
    other = scan.bold.get(label)
    if label in scan.bad or (other is not None and other.file == path and is_same(path, name, other.dataset)):
        return
    if other is not None:
        found = f"a second scan of {which}"
        raise InputError(path, name, found=found, expected="one", fix=f"The other is {other}.")
    try:
        scan.bold[label] = describe(path, name, dimensions=(2,), expected="(TRs, parcels)")
    except InputError as error:
        if not mistakes.skip:
            raise
        scan.bad[label] = error
