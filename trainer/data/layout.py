"""Where the BOLD and the features of a data set lie, described in YAML by patterns instead of in code.

A pattern is a path below the root, or an HDF5 data set name, with named fields in braces (`{subject}`, `{session}`,
`{run}`, ...), `*` and `**` as in a shell, and square brackets around a part that may be absent: the data sets
`ses-012_task-life01_run-2` and `ses-003_task-s01e02a` both match `ses-{session}_task-{run}[_run-{repeat}]`. Fields
whose value is not known are matched, never guessed: session numbers follow no order.
"""

from __future__ import annotations

import difflib
import functools
import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.errors import InputError
from trainer.strict import StrictModel, read_yaml, validated

GROUPS = ("season", "episode", "part", "film")
_TOKEN = re.compile(
    r"\{(?P<field>\w+)\}|(?P<deep>\*\*/)|(?P<star>\*)|(?P<open>\[)|(?P<close>\])|(?P<text>.)", re.DOTALL
)


def pattern_regex(pattern: str, known: Mapping[str, str] | None = None) -> re.Pattern[str]:
    """The regular expression that a pattern stands for; each field is a named group, a repeated field must agree.

    A field of `known` stands for its value, to the letter: what a value holds is never read as part of a pattern.
    """
    return _compiled(pattern, tuple(sorted((known or {}).items())))


@functools.cache
def _compiled(pattern: str, known: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    values = dict(known)
    seen: set[str] = set()
    parts: list[str] = []
    for token in _TOKEN.finditer(pattern):
        field = token["field"]
        if field in values:
            parts.append(re.escape(values[field]))
        elif field in seen:
            parts.append(f"(?P={field})")
        elif field:
            seen.add(field)
            parts.append(rf"(?P<{field}>\d+)" if field == "repeat" else rf"(?P<{field}>[^/]+?)")
        else:
            kind = str(token.lastgroup)
            simple = {"deep": r"(?:.*/)?", "star": r"[^/]*", "open": "(?:", "close": ")?"}
            parts.append(simple.get(kind, re.escape(token.group())))
    return re.compile("".join(parts), re.DOTALL)


def _globs(pattern: str, known: Mapping[str, str]) -> set[str]:
    """Shell patterns of which one at least finds every path that a pattern matches: one for each choice of parts."""
    levels = [[""]]
    for token in _TOKEN.finditer(pattern):
        if token.lastgroup == "open":
            levels.append([""])
            continue
        if token.lastgroup == "close":
            ends = [*levels.pop(), ""]
        elif token["field"]:
            ends = [glob.escape(known[token["field"]]) if token["field"] in known else "*"]
        else:
            ends = [glob.escape(token.group()) if token["text"] else token.group()]
        levels[-1] = [start + end for start in levels[-1] for end in ends]
    return set(levels[0])


def _valid_pattern(pattern: str) -> str:
    try:
        pattern_regex(pattern)
    except re.error as error:
        raise ValueError(f"found {pattern!r}, expected a pattern with balanced brackets ({error})") from error
    return pattern


def fill(pattern: str, known: Mapping[str, str]) -> str:
    """The pattern with the known fields written in, for people to read: it is no pattern any more."""
    return re.sub(r"\{(\w+)\}", lambda m: known.get(m[1], m[0]), pattern)


def find_files(root: Path, pattern: str, known: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Files below `root` that match, in order of name, each with the values of all its fields."""
    # glob, since Path.glob does not walk into linked folders, and people link their features.
    shapes = _globs(pattern, known)
    for shape in shapes:
        _check_readable(root, shape)
    names = {name for shape in shapes for name in glob.iglob(shape, root_dir=root, recursive=True)}  # noqa: PTH207
    expression = pattern_regex(pattern, known)
    for name in sorted(names):
        match = expression.fullmatch(name)
        if match:
            yield root / name, {**known, **{k: v for k, v in match.groupdict().items() if v is not None}}


def _enter(folder: Path) -> None:
    """Raise PermissionError that names a folder whose files cannot be reached."""
    try:
        os.stat(f"{folder}/.")  # noqa: PTH116  (pathlib drops the dot, and so asks the folder above)
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(folder)) from error


def _check_readable(root: Path, shape: str) -> None:
    """Raise PermissionError for a folder below `root` that glob would have to enter or list and cannot.

    glob passes over such a folder in silence, and the runs in it would be missing.
    """
    parts = shape.split("/")
    for depth, part in enumerate(parts):
        above = "/".join(parts[:depth])
        for name in glob.iglob(above, root_dir=root, recursive=True) if above else [""]:  # noqa: PTH207
            folder = root / name
            if folder.is_dir():
                _enter(folder)
                if glob.has_magic(part):
                    os.scandir(folder).close()


@dataclass(frozen=True)
class RunGroups:
    """What a run's name says about it; None where it says nothing."""

    season: int | None = None
    episode: int | None = None
    part: str | None = None
    film: str | None = None


class BoldPattern(StrictModel):
    """Where the BOLD of one series lies."""

    file: str = Field(description="pattern of the HDF5 files below the root")
    dataset: str = Field(description="pattern of the data set names in such a file")

    @field_validator("file", "dataset")
    @classmethod
    def _patterns(cls, pattern: str) -> str:
        return _valid_pattern(pattern)


class SeriesLayout(StrictModel):
    """One series of runs, e.g. all episodes of one show.

    A series without `bold` can be predicted but neither trained on nor scored. Its runs are those of the
    `target_sample_number` files, which also say how long they are; without such files those of the features.
    """

    bold: BoldPattern | None = Field(None, description="where its BOLD lies; a series without it is only predicted")
    folder: str | None = Field(None, description="the field {series} of feature_files, where it is not the name")
    target_sample_number: str | None = Field(
        None,
        description="for a series without BOLD: pattern of the .npy files, one a subject, that hold a pickled dict "
        "run -> TRs to predict",
    )
    runs: list[str] = Field(
        default_factory=lambda: [".+"],
        description="regular expressions of run names, with groups season, episode, part, film",
    )

    @field_validator("runs", mode="before")
    @classmethod
    def _one_or_many(cls, runs: Any) -> Any:
        return [runs] if isinstance(runs, str) else runs

    @field_validator("runs")
    @classmethod
    def _known_groups(cls, runs: list[str]) -> list[str]:
        for expression in runs:
            try:
                groups = re.compile(expression).groupindex
            except re.error as error:
                raise ValueError(f"found {expression!r}, expected a regular expression ({error})") from error
            unknown = sorted(set(groups) - set(GROUPS))
            if unknown:
                raise ValueError(f"found the group {unknown[0]!r}, expected groups among {', '.join(GROUPS)}")
        return runs

    @model_validator(mode="after")
    def _known_without_bold(self) -> SeriesLayout:
        if self.bold is None and "runs" not in self.model_fields_set:
            raise ValueError("runs: missing, expected it in a series without bold: only it tells which runs are there")
        if self.target_sample_number is None:
            return self
        if self.bold is not None:
            raise ValueError("target_sample_number: found beside bold, expected one of them")
        if "{subject}" not in _valid_pattern(self.target_sample_number):
            raise ValueError("target_sample_number: found no field {subject}, expected it")
        return self

    def groups(self, run: str) -> RunGroups | None:
        """What the run's name says, or None where it matches no expression (the run is of another series)."""
        for expression in self.runs:
            match = re.fullmatch(expression, run)
            if match:
                season, episode, part, film = (match.groupdict().get(group) for group in GROUPS)
                return RunGroups(int(season) if season else None, int(episode) if episode else None, part, film)
        return None


class FeatureModel(StrictModel):
    """One row of the table of feature models."""

    folder: str = Field(description="folder of its files: the field {model} of feature_files")
    layers: dict[str, str] = Field(
        default_factory=dict, description="LAYER -> HDF5 data set; a layer that is not listed is the data set's name"
    )
    pool: Literal["mean"] | None = Field(None, description="mean: the layers of a (T, L, D) data set are averaged")
    dtype: Literal["float16", "float32"] = Field("float16", description="how the shards store it")


class Layout(StrictModel):
    """A data set on disk."""

    name: str = Field(description="name of the data set")
    tr: float = Field(gt=0, le=100, description="repetition time in seconds")
    subjects: dict[str, str] = Field(min_length=1, description="label -> folder name: the field {subject}")
    series: dict[str, SeriesLayout] = Field(min_length=1, description="the series of runs")
    feature_files: list[str] = Field(
        min_length=1,
        description="patterns of feature files with {model}, {series}, {run}; the first that matches counts",
    )
    features: dict[str, FeatureModel] = Field(min_length=1, description="KEY -> feature model")
    include_features: list[str] = Field(
        default_factory=list, description="streams KEY/LAYER that shards hold unless --features names others"
    )

    @field_validator("subjects")
    @classmethod
    def _labels_are_names(cls, subjects: dict[str, str]) -> dict[str, str]:
        """Labels become names of groups in HDF5 files and parts of file names."""
        for label in subjects:
            if not label or label in (".", "..") or "/" in label or not label.isprintable():
                raise ValueError(f"found the label {label!r}, expected text that can be part of a file name, without /")
        return subjects

    @field_validator("feature_files")
    @classmethod
    def _has_a_run(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            if "{run}" not in _valid_pattern(pattern):
                raise ValueError(f"found {pattern!r}, expected the field {{run}} in it")
        return patterns

    @model_validator(mode="after")
    def _bold_names_a_run(self) -> Layout:
        for name, series in self.series.items():
            if series.bold is None:
                continue
            if "{run}" not in series.bold.file + series.bold.dataset:
                raise ValueError(f"series.{name}.bold: found no field {{run}}, expected it in file or dataset")
            if "{subject}" not in series.bold.file + series.bold.dataset:
                raise ValueError(f"series.{name}.bold: found no field {{subject}}, expected it in file or dataset")
        return self

    def feature(self, stream: str) -> tuple[FeatureModel, str]:
        """The feature model of a stream `KEY/LAYER` and the HDF5 data set that holds the layer (LAYER if not listed).

        Raises:
            InputError: the name is not of that form, or the table has no such KEY (the nearest is suggested).
        """
        key, slash, layer = stream.partition("/")
        if not slash or not layer:
            raise InputError(f"stream {stream}", "not a stream", expected="KEY/LAYER, e.g. whisper/layers.12")
        if key not in self.features:
            nearest = difflib.get_close_matches(key, self.features, n=1, cutoff=0.4)
            raise InputError(
                f"stream {stream}",
                "unknown feature model",
                found=key,
                expected=f"one of {', '.join(self.features)}",
                fix=f"Did you mean {nearest[0]}/{layer}?" if nearest else None,
            )
        return self.features[key], self.features[key].layers.get(layer, layer)


def load_layout(path: str | Path) -> Layout:
    """Read a layout. Raises InputError naming file and key for anything unknown, missing or of a wrong type."""
    return validated(Layout, read_yaml(Path(path)), path)
