"""Many runs of one configuration: a sweep over its keys, or one stage 2 a subject; and the table of their scores.

    {stage1.lr: [1e-3, 3e-4], seed: [1, 2]}             the product: four runs
    [{stage1.lr: 1e-3, seed: 1}, {stage1.lr: 3e-4}]     as given: two

A run of a sweep is a folder in the sweep's, named by its own overrides alone: when a value is added to the file, those
that have run keep their names, and are not run again. The product turns its last key fastest.

    python -m trainer.cluster.sweep DIR         the scores of all runs in DIR, also as DIR/scores.csv
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import Config, differing_keys, load_config
from trainer.data.manifest import Manifest
from trainer.errors import InputError, exit_on_input_error
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.files import write_whole
from trainer.stored import load_stored
from trainer.strict import as_declared, declared, flat, parse_yaml
from trainer.text import read_text
from trainer.written import parse_written

LONGEST_NAME = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9.+_-]+")


@dataclass(frozen=True)
class Element:
    """One of many runs.

    Attributes:
        name: of its folder.
        overrides: `key=value`, what is its own in the configuration.
    """

    name: str
    overrides: tuple[str, ...]


def elements(path: Path) -> list[Element]:
    """The runs of a sweep file, in its order.

    Raises:
        InputError: it cannot be read, holds neither lists of values nor a list of mappings, or one run twice.
    """
    data = parse_written(read_text(path), str(path))
    if isinstance(data, dict):
        chosen = _product(path, dict(flat(data)))
    elif isinstance(data, list) and all(isinstance(one, dict) for one in data):
        chosen = [{key: _declared(key, value) for key, value in flat(one)} for one in data]
    else:
        raise InputError(path, "is no sweep", expected="{key: [values], ...} or a list of {key: value, ...}")
    if not chosen or not all(chosen):
        raise InputError(path, "leaves nothing to run", expected="at least one key and one value in each run")
    return named([tuple(f"{key}={_text(value)}" for key, value in one.items()) for one in chosen], path)


def checked(chosen: Sequence[Element], config: Path, overrides: Sequence[str] = ()) -> list[Config]:
    """The configurations of the runs, read before anything is submitted.

    Args:
        chosen: the runs.
        config: the file that they share.
        overrides: those that they share.

    Raises:
        InputError: an override of a run fits no key, or has a wrong value; the run is named.
    """
    found = []
    for element in chosen:
        if resources := [word for word in element.overrides if word.startswith("slurm.")]:
            fix = "The elements of a job array share their resources; submit several sweeps."
            raise InputError(element.name, "differs in what it asks of SLURM", found=resources[0], fix=fix)
        try:
            found.append(load_config(config, [*overrides, *element.overrides]))
        except InputError as error:
            raise InputError(element.name, str(error)) from error
    return found


def named(chosen: Sequence[tuple[str, ...]], where: Path) -> list[Element]:
    """Runs with the names of their folders, which are theirs alone whatever their values hold.

    Raises:
        InputError: two have the same overrides.
    """
    if twice := [words for words, times in Counter(chosen).items() if times > 1]:
        raise InputError(where, "gives a run twice", found=" ".join(twice[0]), fix="Keep one of them.")
    readable = [",".join(_safe(word) for word in words) for words in chosen]
    # of names that differ only in case some file systems make one folder
    times = Counter(name.lower() for name in readable)
    return [
        Element(name if times[name.lower()] == 1 and len(name) <= LONGEST_NAME else _marked(name, words), words)
        for name, words in zip(readable, chosen, strict=True)
    ]


def _safe(override: str) -> str:
    """An override in characters that no shell, path or SLURM pattern reads anything into."""
    key, _, value = override.partition("=")
    return f"{_UNSAFE.sub('-', key)}={_UNSAFE.sub(' ', value).strip().replace(' ', '-') or '-'}"


def _marked(name: str, words: Sequence[str]) -> str:
    mark = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}~{mark}"


def _product(path: Path, lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(path, key, found=repr(values), expected=f"a list of values, e.g. [{values}]")
    taken = {key: [_declared(key, value) for value in values] for key, values in lists.items()}
    return [dict(zip(taken, values, strict=True)) for values in itertools.product(*taken.values())]


def _declared(key: str, value: Any) -> Any:
    """A value of the file as the key's type takes it: a label as it is written, 1e-3 as the number 0.001."""
    return as_declared(declared(Config, key.split(".")), value)


def _text(value: Any) -> str:
    """A value as it stands in an override: YAML that is read as the same value again."""
    if isinstance(value, str) and value and value == value.strip():
        try:
            if parse_yaml(value) == value:
                return value
        except InputError:
            pass
    return json.dumps(value, ensure_ascii=False)


# One stage 2 a subject


def subjects(config: Config, run: Path) -> list[Element]:
    """The runs `subject_<label>` of stage 2 alone, one for each subject that stage 1 in `run` learns from.

    Each takes the BOLD of its subject only, in all sets; `link_stage1` makes their folders.

    Raises:
        InputError: the shards are not there yet, a set lacks a subject that is trained, or a folder is in the way.
    """
    from trainer.data.cache import local_folder  # imports torch

    given = config.datasets["train"].filter.subjects
    manifest = Manifest.read(str(local_folder(config.data.shards, config.data.cache_dir, config.data.cache_gb)))
    labels = [label for label in manifest.subjects if given is None or label in given]
    for name, dataset in config.datasets.items():
        taken = dataset.filter.subjects
        if taken is not None and (lacking := set(labels).difference(taken)):
            where, expected = f"datasets.{name}.filter.subjects", f"all that are trained: {', '.join(labels)}"
            raise InputError(where, f"lacks {min(lacking)}", found=taken, expected=expected)
    keys = [f"datasets.{name}.filter.subjects" for name in config.datasets]
    chosen = [Element(f"subject_{label}", tuple(f"{key}={_text([label])}" for key in keys)) for label in labels]
    for element in chosen:
        link = run / element.name / "stage1"
        if (link.exists() or link.is_symlink()) and link.resolve() != (run / "stage1").resolve():
            raise InputError(link, "is not the stage 1 of the run around it", fix="Choose another --run.")
    return chosen


def link_stage1(run: Path, chosen: Sequence[Element]) -> None:
    """Make the folders of the subjects' runs; the stage 1 of each is that of `run`, which need not be trained yet.

    Raises:
        InputError: the file system has no symbolic links, or refuses one here.
    """
    for element in chosen:
        link = run / element.name / "stage1"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            try:
                link.symlink_to(Path("..") / "stage1", target_is_directory=True)
            except OSError as error:
                fix = "Choose a --run on a file system with symbolic links: each subject's stage 1 is the run's."
                raise InputError(link, f"cannot be made as a symbolic link: {error.strerror}", fix=fix) from error


# The table of scores


@dataclass(frozen=True)
class Scores:
    """What is compared of a run.

    Attributes:
        name: of its folder.
        config: None where nothing of it has begun.
        r: (stage, set) -> Pearson's r of the chosen checkpoint's mean, or of the best so far where the stage runs.
        files: (stage, set) -> all that the score file says.
        ended: the stages that have finished.
    """

    name: str
    config: Config | None
    r: Mapping[tuple[int, str], float | None]
    ended: frozenset[int] = frozenset()
    files: Mapping[tuple[int, str], Mapping[str, Any]] = field(default_factory=dict)


def table(runs: Sequence[Path], target: Path | None = None) -> str:
    """The scores of runs as aligned lines; also as a file of comma-separated values, where `target` says so.

    A star marks the best r of a stage on the validation set alone: to choose by another set is to look at the test.
    Below stands which scores were taken on other BOLD than those above them.
    """
    found = [read_scores(run) for run in runs]
    rows = list(rows_of(found))
    if target is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_whole(target, text.getvalue())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join([*("  ".join(row).rstrip() for row in padded), *_not_comparable(found)])


def _not_comparable(found: Sequence[Scores]) -> Iterator[str]:
    """A sentence for each two runs one below the other that were scored on other BOLD of a set."""
    from trainer.evaluation.same_data import notes_between  # imports torch

    for stage, name in dict.fromkeys(column for scores in found for column in scores.files):
        files = {scores.name: scores.files[stage, name] for scores in found if (stage, name) in scores.files}
        yield from notes_between(f"r{stage} {name}", files)


def read_scores(run: Path) -> Scores:
    """The scores of a run from its files, whatever part of it is there."""
    stages = {number: RunDirectory(run).stage(number) for number in (1, 2)}
    begun = [number for number, stage in stages.items() if stage.config.exists()]
    config = load_stored(stages[max(begun)].config) if begun else None
    files = {(n, name): score for n in begun if config for name, score in _chosen(stages[n], config).items()}
    r = {column: score.get("pearson_r") for column, score in files.items()}
    return Scores(run.name, config, r, frozenset(n for n in begun if stages[n].finished() is not None), files)


def _chosen(stage: StageDirectory, config: Config) -> dict[str, dict[str, Any]]:
    """Set -> score of the chosen step; what was trained again for so many steps takes the place of what chose them."""
    scores = list(stage.read_scores())
    finished = stage.finished()
    step = finished["step"] if finished else checkpoint.best_step(scores, config.val_set_name)
    means = [score for score in (*scores, *stage.refit.read_scores()) if score["estimate"] == "mean"]
    return {score["set"]: score for score in means if score["step"] == step}


def rows_of(found: Sequence[Scores]) -> Iterator[list[str]]:
    """A header, and of each run its own values of the keys that differ, its r, and which stages have not finished."""
    configs = [scores.config for scores in found if scores.config is not None]
    keys = list(dict.fromkeys(key for config in configs[1:] for key in differing_keys(configs[0], config)))
    sets = list(dict.fromkeys(name for config in configs for name in config.datasets))
    validations = {config.val_set_name for config in configs}
    known = {column for scores in found for column in scores.r}
    columns = [
        (stage, name) for stage in (1, 2) for name in _validation_first(sets, validations) if (stage, name) in known
    ]
    best = {column: _best(scores.r.get(column) for scores in found) for column in columns if column[1] in validations}
    yield ["run", *keys, *(f"r{stage} {name}" for stage, name in columns), "not finished"]
    for scores in found:
        own = [_value(scores.config, key) for key in keys]
        cells = [_cell(scores.r.get(column), best.get(column)) for column in columns]
        open_ = [f"stage{stage}" for stage in (1, 2) if stage not in scores.ended]
        yield [scores.name, *own, *cells, " ".join(open_)]


def _validation_first(sets: Sequence[str], validations: Iterable[str]) -> list[str]:
    first = set(validations)
    return sorted(sets, key=lambda name: name not in first)


def _best(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _cell(r: float | None, best: float | None) -> str:
    return "" if r is None else f"{r:.4f}{'*' if r == best else ''}"


def _value(config: Config | None, key: str) -> str:
    """A configuration's value of a dotted key, as it would be written."""
    if config is None:
        return ""
    return _text(dict(flat(config.model_dump(mode="json"))).get(key))


def runs_in(home: Path) -> list[Path]:
    """The runs in a folder that have begun, in the order of their names."""
    found = [path for path in sorted(home.glob("*")) if path.is_dir() and path.name not in ("stage1", "stage2")]
    return [path for path in found if any(RunDirectory(path).stage(number).config.exists() for number in (1, 2))]


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the table of the runs in a folder; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.cluster.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("home", type=Path, metavar="DIR", help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="write DIR/report.html about all of them too")
    options = parser.parse_args(argv)
    runs = runs_in(options.home)
    if not runs:
        raise InputError(options.home, "holds no run that has begun", expected="the folder of a sweep")
    print(table(runs, options.home / "scores.csv"), flush=True)
    if options.report:
        from trainer.evaluation.report import write_report

        print(f"report: {write_report(runs, options.home)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
