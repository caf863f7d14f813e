"""Checkpoints that the training may delete, replace or still be writing while somebody scores them.

A checkpoint that is scored is held: hard links to its files (copies, where the file system gives none) stand beside it,
under a name that the training does not touch, until all processes have read them. So they see the same bytes, or none.

    checkpoints/.scored.step_00000500-val.12/step_00000500/
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.data.study import Study
from trainer.errors import InputError
from trainer.progress import say
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.run.files import naming
from trainer.scoring.score import score_checkpoint
from trainer.scoring.shares import Ranks, in_order

_PREDICT = {"meta.json", checkpoint.MODEL, checkpoint.EMA}
SETTLE_S = 30.0
"""A checkpoint that is not whole, and has not changed for so long, is damaged; before, it may still be copied."""


def hold(folder: Path, name: str) -> Path | None:
    """Hold what predicts of a checkpoint, for the piece of work `name`; the folder that then stands for `checkpoints`.

    What a killed worker held for the same piece is let go; None where the checkpoint is gone.

    Raises:
        OSError: it cannot be read, or nothing can be written beside it.
    """
    let_go_of(folder.parent, name)
    held = folder.parent / f".scored.{name}.{os.getpid()}"
    try:
        source = os.open(folder, os.O_RDONLY)  # the folder that this is now, whatever its name will be
        try:
            (held / folder.name).mkdir(parents=True)
            for file in _PREDICT.intersection(os.listdir(source)):  # noqa: PTH208  (pathlib lists no descriptor)
                _keep(file, source, held / folder.name / file)
        finally:
            os.close(source)
    except FileNotFoundError:
        let_go(held)
        return None
    except BaseException:
        let_go(held)
        raise
    return held


def _keep(file: str, source: int, kept: Path) -> None:
    """Link a file of the opened folder `source`, or copy it where links are refused.

    A file system may have none, or the kernel refuse them for another user's files (fs.protected_hardlinks).
    """
    try:
        os.link(file, kept, src_dir_fd=source)
    except FileNotFoundError:
        raise
    except OSError:
        original = os.open(file, os.O_RDONLY, dir_fd=source)
        with os.fdopen(original, "rb") as reader, naming(kept, kept), kept.open("xb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)


def let_go(held: Path) -> None:
    """Remove the links to a held checkpoint, or its copies."""
    shutil.rmtree(held, ignore_errors=True)


def let_go_of(checkpoints: Path, name: str) -> None:
    """Remove what killed workers held for a piece of work; nobody else may be at it."""
    for left in checkpoints.glob(f".scored.{name}.*"):
        let_go(left)


def score_if_whole(
    directory: StageDirectory, number: int, step: int, study: Study, sets: Sequence[str], processes: Ranks
) -> str | None:
    """Score all there is to score of a checkpoint, on all ranks, which read and check its files first.

    Returns: on every rank, what is wrong with the checkpoint, as any of them found it; None where it was scored.

    Raises:
        InputError: the checkpoint is whole, and does not fit the shards, or a shard cannot be read.
    """

    def read() -> list[None]:
        checkpoint.load(checkpoint.folder_of(directory.checkpoints, step), weights_only=True)
        return []

    try:
        in_order(processes, read)
    except InputError as error:
        return str(error)
    score_checkpoint(directory, number, step, study, sets, processes, say, full=True)
    return None


class Settling:
    """Checkpoints that were not whole when they were read, but may still be copied, file by file."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[object, float]] = {}

    def is_damaged(self, folder: Path, content: object) -> bool:
        """Note what a checkpoint held when it was found not whole; whether it held the same when it was so before.

        In between lies `SETTLE_S`, where who reads leaves out the `steps`.
        """
        before, _ = self._seen.get(folder, (None, 0.0))
        self._seen[folder] = (content, time.monotonic())
        return content == before

    def steps(self, checkpoints: Path) -> frozenset[int]:
        """Steps that need not be read again yet, as nothing has changed in them and `SETTLE_S` has not passed."""
        now = time.monotonic()
        return frozenset(
            int(folder.name.removeprefix("step_"))
            for folder, (content, since) in self._seen.items()
            if folder.parent == checkpoints and now - since < SETTLE_S and content_of(folder) == content
        )


def content_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a checkpoint's files; empty where it is gone."""
    try:
        files = [(path.name, path.stat()) for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in files)
