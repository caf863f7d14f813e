"""Open the shards of a stage that has started, and compare them with what the stage was trained and validated on.

Everyone who meets shards on behalf of a run (scores, predictions, ensembles, a resume, a stage 2) does it through here;
`data/identity.py` decides what counts as the same data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from trainer.config import Config
from trainer.data.identity import DataRecord, Known, unrecorded
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.run.files import read_object, write_json


def open_study(stage: StageDirectory, config: Config) -> Study:
    """The study of a stage that is scored or predicted with.

    Args:
        stage: its directory (not its refit's, which has the data of the stage).

    Raises:
        InputError: as `Study`.
    """
    return Study(config, known_data(stage))


def known_data(stage: StageDirectory) -> list[Known]:
    """What a stage has used, and the anchor that it stands around; empty where neither is known.

    Raises:
        InputError: a record cannot be read.
    """
    found = (_recorded(stage.path) or _unrecorded(stage), _recorded(stage.anchor))
    return [known for known in found if known is not None]


def write_record(stage: StageDirectory, record: DataRecord) -> None:
    """Write down what a stage that starts now is trained and validated on."""
    write_json(stage.data, record.as_json())


def copy_record(source: StageDirectory, target: Path) -> None:
    """Lay what the anchor of a stage was trained on beside a copy of its weights."""
    for known in known_data(source)[:1]:
        write_json(StageDirectory(target).data, known.record.as_json())


def warn(lines: Iterable[str]) -> None:
    """Print warnings about the data."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def _recorded(folder: Path) -> Known | None:
    path = StageDirectory(folder).data
    if not path.exists():
        return None
    content = read_object(path, "manifest", "subjects", "showings", "sets")
    try:
        return Known(folder, DataRecord.from_json(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(path, "no record of data", found=repr(error)) from error


def _unrecorded(stage: StageDirectory) -> Known | None:
    """What the newest readable checkpoint says of the data of a stage from before there were records."""
    for step in reversed(checkpoint.steps(stage.checkpoints)):
        try:
            meta = checkpoint.read_meta(checkpoint.folder_of(stage.checkpoints, step))
            return Known(stage.path, unrecorded(str(meta.get("shards", "")), meta["shapes"]["subjects"]))
        except (InputError, KeyError, TypeError):
            continue
    return None
