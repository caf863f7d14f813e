"""What is scored of a set, kept run by run: an interruption loses no more than the run under way.

    scores/partial/step_00000500-val-1f3a9c.../run-00003.npz

A folder belongs to one checkpoint and one set. Its name ends with a hash of all that the results depend on, so results
of other weights, data or options are never taken for these; such folders of the same checkpoint and set are removed.
Processes that score the same at the same time write the same bytes, so none has to wait for another. The folder goes
when the score files are there.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from trainer.data.study import Study
from trainer.run import checkpoint
from trainer.run.code import sha256
from trainer.run.directory import StageDirectory
from trainer.scoring.rsa import Groups
from trainer.scoring.shares import Ranks

FOLDER = "partial"

Accumulator = TypeVar("Accumulator")
Arrays = Mapping[str, np.ndarray]


class Kept:
    """Named arrays in a folder; without a folder nothing is kept, and nothing is there.

    What cannot be written (a full disk, say) is not kept, which is said once: the scores themselves do not need it.
    """

    def __init__(self, folder: Path | None, processes: Ranks | None = None) -> None:
        self._folder, self._processes = folder, processes
        self.owner = uuid.uuid4().hex
        """Tells this from all that write into the folder or have: a restart in a container has its old host and PID."""

    def begin(self) -> None:
        """Remove what was kept of the same checkpoint and set under other conditions."""
        if self._folder is not None:
            remove(self._folder.parent, self._folder.name.rpartition("-")[0], but=self._folder.name)

    def remove(self) -> None:
        """Remove all that was kept of the checkpoint and set."""
        if self._folder is not None:
            remove(self._folder.parent, self._folder.name.rpartition("-")[0])

    def names(self, kind: str) -> list[str]:
        """The names that begin with `kind-`, in order."""
        if self._folder is None or not self._folder.is_dir():
            return []
        return sorted(path.stem for path in self._folder.glob(f"{kind}-*.npz"))

    def read(self, name: str) -> Arrays | None:
        """The arrays of a name; None where they are not there, or torn."""
        if self._folder is None:
            return None
        try:
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def write(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under a name, which appears whole."""
        if self._folder is None:
            return
        aside = self._folder / f".{name}.{self.owner}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # a name could be `allow_pickle`, says numpy
            aside.replace(self._folder / f"{name}.npz")
        except OSError as error:
            if self._processes is not None and self._processes.is_main:
                what = "what is scored is not kept for the case of an interruption"
                print(f"warning: {self._folder}: {what}: {error.strerror}", file=sys.stderr)
            self._folder = None
        finally:
            aside.unlink(missing_ok=True)


NOTHING_KEPT = Kept(None)


def kept_of(
    directory: StageDirectory, stage: int, step: int, set_name: str, study: Study, groups: Groups, processes: Ranks
) -> Kept:
    """What is kept of one checkpoint and one set."""

    def conditions() -> str:
        weights = [checkpoint.folder_of(directory.checkpoints, step), *([directory.anchor] if stage == 2 else [])]
        hashes = [checkpoint.read_meta(folder)["sha256"] for folder in weights]
        return _conditions(hashes, study, set_name, groups, processes.device.type)

    folder = f"step_{step:08d}-{set_name}-{processes.first(conditions)}"
    return Kept(directory.scores / FOLDER / folder, processes)


def _conditions(weights: Sequence[Mapping[str, str]], study: Study, set_name: str, groups: Groups, device: str) -> str:
    """All that results depend on, as one word: weights, data, configuration, labels, code and kind of device."""
    facts = (
        weights,
        [record.sha256 for record in study.manifest.shards],
        study.spans[set_name],
        study.config.to_yaml(),
        [(name, parcels.tolist()) for name, parcels in groups.items()],
        sha256(),
        device,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def units(folder: Path) -> set[str]:
    """The checkpoints and sets, `step_00000500-val`, of which something is kept."""
    return {path.name.rpartition("-")[0] for path in folder.glob("step_*-*-*")}


def remove(folder: Path, unit: str, but: str | None = None) -> None:
    """Remove what was kept of a checkpoint and set, except for the folder named `but`."""
    for path in folder.glob(f"{unit}-*"):
        if path.name != but and path.name.rpartition("-")[0] == unit:
            shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


def named(prefix: str, accumulator: object) -> dict[str, np.ndarray]:
    """The arrays of an accumulator, whose attributes are all arrays, by prefixed name."""
    return {f"{prefix}/{name}": array for name, array in vars(accumulator).items()}


def filled(accumulator: Accumulator, prefix: str, arrays: Arrays) -> Accumulator:
    """An accumulator with the arrays that `named` gave."""
    for name in vars(accumulator):
        setattr(accumulator, name, arrays[f"{prefix}/{name}"])
    return accumulator
